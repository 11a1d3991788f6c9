"""Construction of the trained language model: base or random weights, vocabulary, LoRA, precision,
attention.

Trained weights are kept in fp32 with a base of any precision, because steps of 1e-4 are lost in
bf16 (PEFT would leave embeddings and norms in the base's precision).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.config import project_path
from seed_multimodal.device import DTYPES, seeded
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.language.llm import (
    LLAMA,
    MAX_PADDING,
    check_sizes,
    force_special_ids,
    load_llm,
    output_scores,
    register_class,
)
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.settings import check_keys
from seed_multimodal.state_dicts import copy_weights, load_state_dict
from seed_multimodal.training.llm.config import ATTENTIONS, LlmModelSettings
from seed_multimodal.training.llm.lora import (
    adapter_state,
    add_lora,
    is_lora,
    load_adapter,
    recorded_lora,
    save_adapter,
)
from seed_multimodal.training.llm.loss import (
    SEGMENTS,
    add_packed_lengths,
    find_llama,
    segment_attention,
)
from seed_multimodal.weights.find import portable_path

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def build_llm(
    settings: LlmModelSettings,
    tokenizer: TextTokenizer,
    device: str | torch.device,
    precision: str | None = None,
    *,
    sharded: bool = False,
) -> nn.Module:
    """The model on `device`, in train mode, with the tokenizer's vocabulary size.

    precision: of the run's forward passes; None: the frozen weights' dtype.
    sharded: the engine casts and shards the weights (ZeRO-3); until then they stay on the CPU as in
        their files.

    Raises:
        ConfigError: inconsistent settings or tokenizer. CheckpointError: mismatched weights.
    """
    settings = _with_adapter(settings)
    device = torch.device(device)
    load_device = torch.device("cpu") if sharded else device

    # 1. The base, with a row for each token.
    llama = _load_base(settings, tokenizer, load_device, sharded)
    has_new_rows = int(llama.config.vocab_size) < tokenizer.vocabulary.size
    force_special_ids(llama, tokenizer)
    _check_head(llama)
    fit_vocabulary(llama, tokenizer, settings.seed, settings.embedding_init)
    is_half = (precision or settings.dtype) != "fp32"
    _set_attention(llama, settings, device, is_half)
    llama.get_decoder().register_forward_pre_hook(add_packed_lengths, with_kwargs=True)

    # 2. The trained weights: all, or LoRA and whole modules.
    model: nn.Module = llama
    if settings.lora is not None:
        model = add_lora(llama, settings.lora, settings.seed)
        _train_embeddings(llama, settings.train_embeddings, has_new_rows)
        if settings.adapter is not None:
            load_adapter(model, project_path(settings.adapter))
    if settings.freeze_embeddings:
        if has_new_rows:
            raise ConfigError(
                "The base gets new tokens, but freeze_embeddings leaves their rows untrained."
            )
        llama.get_input_embeddings().requires_grad_(False)

    # 3. Precision and device. Cast in place, so that tied embeddings stay one parameter.
    stays_as_in_files = sharded and settings.lora is None
    for parameter in model.parameters():
        if parameter.requires_grad and not stays_as_in_files:
            parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        _enable_checkpointing(llama)
    if settings.quantization is None:  # bitsandbytes has placed a quantized base
        model.to(load_device)
    if settings.compile:
        for layer in llama.get_decoder().layers:
            layer.compile()
    return model.train()


def _with_adapter(settings: LlmModelSettings) -> LlmModelSettings:
    """The settings with the LoRA fields that `adapter` records; a folder of all weights becomes the
    base."""
    if settings.adapter is None or settings.lora is not None:
        return settings
    lora = recorded_lora(project_path(settings.adapter))
    if lora is None:
        return replace(settings, path=settings.adapter, sizes=None, adapter=None)
    return replace(settings, lora=lora)


def _load_base(
    settings: LlmModelSettings, tokenizer: TextTokenizer, device: torch.device, sharded: bool
) -> LlamaForCausalLM:
    """The model without adapters; in fp32 if fully trained, as in its files if `sharded`."""
    dtype_name = "fp32" if settings.lora is None else settings.dtype or "bf16"
    dtype = DTYPES[dtype_name]
    if settings.sizes is not None:
        llama = _random_llm(settings.sizes, tokenizer, settings.seed)
        return llama.to(dtype)
    folder = project_path(str(settings.path))
    llama = load_llm(
        folder,
        device=device,
        dtype="auto" if sharded else dtype,
        quantization=settings.quantization,
        tokenizer=tokenizer,
    )
    llama.name_or_path = portable_path(folder)  # PEFT writes it into adapter_config.json
    return llama


def _random_llm(sizes: Mapping[str, Any], tokenizer: TextTokenizer, seed: int) -> LlamaForCausalLM:
    """A model with random weights, by default a LLaMA.

    sizes: fields of its configuration; `model_type` chooses another architecture.
    Raises ConfigError: invalid fields. CheckpointError: as `check_sizes`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type = sizes.get("model_type", LLAMA)
    register_class(model_type)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"sizes: model_type {model_type!r} is no model of transformers.")
    config_class = CONFIG_MAPPING[model_type]
    names = list(inspect.signature(config_class.__init__).parameters)[1:]
    check_keys(sizes, [*names, "model_type"], "sizes")
    # The tokenizer determines the vocabulary.
    fields = {**sizes, **tokenizer.special_ids, "vocab_size": tokenizer.vocabulary.size}
    fields.pop("model_type", None)
    with seeded(seed):
        try:
            config = config_class(**fields)
            check_sizes(config, "sizes")
            return AutoModelForCausalLM.from_config(config)
        except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
            raise ConfigError(f"sizes: {' '.join(str(error).split())}") from error


@torch.no_grad()
def _check_head(llama: LlamaForCausalLM) -> None:
    """Raise ConfigError if a model's scores are not those that the loss computes."""
    if llama.config.model_type == LLAMA:
        return
    ids = torch.arange(2, 6, device=llama.get_input_embeddings().weight.device)[None]
    states = llama.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    expected = llama(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(output_scores(llama, states), expected, rtol=0.05, atol=0.05):
        raise ConfigError(
            f"model: the head of a {llama.config.model_type} does more than a matrix product; such "
            "models cannot be trained."
        )


def _set_attention(
    llama: LlamaForCausalLM, settings: LlmModelSettings, device: torch.device, is_half: bool
) -> None:
    """Set the attention of packed rows; `loss.use_attention` changes it per batch.

    Raises ConfigError: flash attention without its package or on unsupported hardware.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = settings.attention
    llama.attentions = {
        packed: attention_kind(name, device, packed, is_half) for packed in (True, False)
    }
    # Compiled layers would be compiled for each number of sequences; other models than LLaMA may
    # have other masks.
    is_causal = llama.config.model_type == LLAMA and not settings.compile
    if is_causal and device.type == "cpu" and llama.attentions[True] == "sdpa":
        AttentionInterface.register(SEGMENTS, segment_attention)
        AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
        llama.attentions[True] = SEGMENTS
    try:
        llama.set_attn_implementation(llama.attentions[True])
    except (ImportError, ValueError) as error:
        raise ConfigError(f"attention {name}: {first_line(error)}") from error


def _train_embeddings(llama: LlamaForCausalLM, train: bool, has_new_rows: bool) -> None:
    """With LoRA: train embeddings and head, unless PEFT trains a copy of them (`modules_to_save`).

    Raises ConfigError: rows of new tokens would not be trained, or a table would be trained twice.
    """
    # PEFT's wrapper of a copied module has `modules_to_save`.
    tables = {
        "embed_tokens": llama.get_input_embeddings(),
        "lm_head": llama.get_output_embeddings(),
    }
    for name, table in tables.items():
        if train and hasattr(table, "lora_embedding_A"):
            raise ConfigError(
                f"{name}: is in lora.target_modules, so train_embeddings cannot train it, too."
            )
        if train and not hasattr(table, "modules_to_save"):
            table.requires_grad_(True)
        is_trained = any(parameter.requires_grad for parameter in table.parameters())
        if has_new_rows and not is_trained:
            raise ConfigError(
                f"The base gets new tokens, but {name} is not trained: add it to "
                "lora.modules_to_save."
            )


def _enable_checkpointing(llama: LlamaForCausalLM) -> None:
    """Recompute activations in the backward pass; newer transformers call it activation
    checkpointing."""
    enable = getattr(llama, "activation_checkpointing_enable", None)
    if enable is None:
        enable = llama.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def attention_kind(name: str, device: torch.device, packed: bool, half: bool = True) -> str:
    """transformers' name of an attention implementation, for packed or padded rows.

    Padded rows need only a causal mask (fast in SDPA) and have many lengths, for each of which flex
    attention would be compiled. Flash attention needs half precision. Raises ConfigError: it is set
    for a run in fp32.
    """
    if name == "flash" and not half:
        raise ConfigError(
            "attention flash: needs trainer.precision bf16 or fp16; use auto or flex for fp32."
        )
    if name != "auto":
        return ATTENTIONS[name]
    if device.type != "cuda" or not packed:
        return ATTENTIONS["sdpa"]
    from transformers.utils import is_flash_attn_2_available

    return ATTENTIONS["flash" if half and is_flash_attn_2_available() else "flex"]


# --------------------------------------------------------------------------------------- vocabulary


def fit_vocabulary(
    llama: LlamaForCausalLM, tokenizer: TextTokenizer, seed: int = 0, embedding_init: str = "normal"
) -> None:
    """Resize the embeddings to the tokenizer's vocabulary; new rows as
    `LlmModelSettings.embedding_init`.

    Raises ConfigError: a model of another vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    rows = int(llama.config.vocab_size)
    if 0 <= rows - vocabulary.size <= MAX_PADDING:
        return
    if not vocabulary.n_text <= rows < vocabulary.size:
        raise ConfigError(
            f"The model has {rows} tokens, but the tokenizer has {vocabulary.n_text} text tokens "
            f"and {vocabulary.size} tokens in all."
        )
    # Rows that pad a table of texts become those of the first image tokens.
    add_embedding_rows(llama, vocabulary.size, seed, embedding_init, vocabulary.n_text)


@torch.no_grad()
def add_embedding_rows(
    llama: LlamaForCausalLM,
    size: int,
    seed: int = 0,
    embedding_init: str = "normal",
    n_text: int | None = None,
) -> None:
    """Enlarge embeddings and head to `size` rows; the new ones as
    `LlmModelSettings.embedding_init`.

    n_text: rows that stay; None: all.
    """
    rows = len(llama.get_input_embeddings().weight) if n_text is None else n_text
    llama.resize_token_embeddings(size, mean_resizing=False)
    embeddings = llama.get_input_embeddings().weight  # [size, width]
    head = llama.get_output_embeddings().weight
    tables = [embeddings] if head is embeddings else [embeddings, head]

    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        if embedding_init == "normal":
            new_rows = torch.empty(size - rows, table.shape[1])
            new_rows.normal_(0.0, llama.config.initializer_range, generator=generator)
        else:
            scale = 1.0 if table is embeddings else 3.0
            new_rows = table[:rows].float().mean(0) * scale
        table[rows:] = new_rows.to(table)


# -------------------------------------------------------------------------------------- checkpoints


def published_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint: the adapter (PEFT 0.4's names), or all, tied ones once."""
    if is_lora(model):
        return adapter_state(model)
    return {name: value.detach() for name, value in model.named_parameters()}


def load_llm_weights(model: nn.Module, folder: Path) -> None:
    """Inverse of `save_llm_weights`. Raises CheckpointError: no weights, or of another model."""
    if is_lora(model):
        load_adapter(model, folder)
        return
    # All weights, in one file or in parts.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: contains no model*.safetensors; was it trained with LoRA?"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_state_dict(file))
    copy_weights(published_weights(model), state, str(folder))


def save_llm_weights(
    model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the trained weights as an adapter or a plain LLaMA folder.

    state: gathered weights (ZeRO-3).
    """
    if is_lora(model):
        return save_adapter(model, folder, state)
    find_llama(model).save_pretrained(folder, state_dict=None if state is None else dict(state))
    return Path(folder)
