"""The originals' builders of a language model with a LoRA, `get_peft_model_with_resize_embedding`
of either repository.

In both, the base is loaded by hydra before the function runs, so `torch_dtype` has no effect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.training.llm.model import add_embedding_rows, fit_vocabulary
from seed_multimodal.weights.find import find_path

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer


def seed_llama_lora(
    model: PreTrainedModel,
    peft_config: LoraConfig | None = None,
    model_id: str | None = None,
    tokenizer: SeedLlamaTokenizer | None = None,
    torch_dtype: str = "bf16",
) -> PeftModel:
    """`src.model.peft_model` of MultiModalLLM: a LoRA on a base whose embeddings are resized to a
    `SeedLlamaTokenizer`; new rows are sampled from N(0, initializer_range).

    Raises ConfigError: a base of another vocabulary.
    """
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer.text)
    return _with_lora(model, peft_config, model_id)


def seed_x_lora(
    model: PreTrainedModel,
    peft_config: LoraConfig | None = None,
    model_id: str | None = None,
    vocab_size: int | None = None,
    torch_dtype: str = "bf16",
) -> PeftModel:
    """`src.models.mllm.peft_models` of SEED-X: new rows of the embeddings are the mean of the old
    ones, those of the head 3 times it; with a new LoRA both are trained in full."""
    n_rows = len(model.get_input_embeddings().weight)
    if vocab_size is not None and vocab_size > n_rows:
        add_embedding_rows(model, vocab_size, embedding_init="mean")
    with_lora = _with_lora(model, peft_config, model_id)
    if peft_config is not None:
        # A trained LoRA is not trained further by this program.
        with_lora.get_input_embeddings().requires_grad_(True)
        with_lora.get_output_embeddings().requires_grad_(True)
    return with_lora


def lora_config(**values: object) -> LoraConfig:
    """`peft.LoraConfig`, for YAML files that `seed_multimodal.config.instantiate` reads."""
    from peft import LoraConfig

    return LoraConfig(**values)


def _with_lora(
    model: PreTrainedModel, peft_config: LoraConfig | None, model_id: str | None
) -> PeftModel:
    """A new LoRA, or a trained one from a folder or hub name."""
    from peft import PeftModel, get_peft_model

    if (peft_config is None) == (model_id is None):
        raise ConfigError(
            "get_peft_model_with_resize_embedding needs either peft_config or model_id."
        )
    if model_id is None:
        return get_peft_model(model, peft_config)
    try:
        return PeftModel.from_pretrained(model, find_path(model_id) or model_id)
    except Exception as error:  # noqa: BLE001  (damaged and unsafe files raise many types)
        raise CheckpointError(f"{model_id}: no complete LoRA ({first_line(error)}).") from error
