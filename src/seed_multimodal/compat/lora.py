"""The originals' builders of a language model with a LoRA, `get_peft_model_with_resize_embedding` of either repository.

In both, the base is loaded by hydra before the function runs, so `torch_dtype` has no effect.
"""

from __future__ import annotations

from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import local_folder
from seed_multimodal.training.llm.model import add_embedding_rows, fit_vocabulary


def seed_llama_lora(
    model: Any,
    peft_config: Any = None,
    model_id: str | None = None,
    tokenizer: Any = None,
    torch_dtype: str = "bf16",
) -> Any:
    """`src.model.peft_model` of MultiModalLLM: a LoRA on a base whose embeddings are resized to a `SeedLlamaTokenizer`;
    new rows are drawn from N(0, initializer_range). Raises `ConfigError`: a base of another vocabulary."""
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer.text)
    return _with_lora(model, peft_config, model_id)


def seed_x_lora(
    model: Any,
    peft_config: Any = None,
    model_id: str | None = None,
    vocab_size: int | None = None,
    torch_dtype: str = "bf16",
) -> Any:
    """`src.models.mllm.peft_models` of SEED-X: new rows of the embeddings are the mean of the old ones, those of the
    head 3 times it; with a new LoRA both are trained whole."""
    old = len(model.get_input_embeddings().weight)
    if vocab_size is not None and vocab_size > old:
        add_embedding_rows(model, vocab_size, embedding_init="mean")
    tuned = _with_lora(model, peft_config, model_id)
    if peft_config is not None:
        tuned.get_input_embeddings().requires_grad_(True)
        tuned.get_output_embeddings().requires_grad_(True)
    return tuned


def lora_config(**values: Any) -> Any:
    """`peft.LoraConfig`, for YAML files that `seed_multimodal.config.instantiate` reads."""
    from peft import LoraConfig

    return LoraConfig(**values)


def _with_lora(model: Any, peft_config: Any, model_id: str | None) -> Any:
    """A new LoRA, or a trained one from a folder or hub name."""
    from peft import PeftModel, get_peft_model

    if (peft_config is None) == (model_id is None):
        raise ConfigError(
            "get_peft_model_with_resize_embedding needs either peft_config or model_id."
        )
    if model_id is None:
        return get_peft_model(model, peft_config)
    return PeftModel.from_pretrained(model, local_folder(model_id) or model_id)
