"""Construction of the trained language model: base or random weights, vocabulary, LoRA, precision, attention.

Trained weights are kept in fp32 with a base of any precision, because steps of 1e-4 are lost in bf16 (PEFT would leave
embeddings and norms in the base's precision).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.hub import portable_path
from seed_multimodal.language.llama import BOS, EOS, PAD, force_special_ids, load_llm
from seed_multimodal.settings import check_keys
from seed_multimodal.training.llm.config import ATTENTIONS, LlmModelSettings, check, project_path
from seed_multimodal.training.llm.lora import (
    adapter_state,
    add_lora,
    copy_weights,
    is_lora,
    load_adapter,
    recorded_lora,
    save_adapter,
)
from seed_multimodal.training.llm.loss import add_packed_lengths, find_llama
from seed_multimodal.weights import load_state_dict


def build_llm(
    settings: LlmModelSettings,
    tokenizer: Any,
    device: str | torch.device,
    precision: str | None = None,
    *,
    sharded: bool = False,
) -> nn.Module:
    """The model on `device`, in train mode, with the tokenizer's vocabulary size.

    `precision`: of the run's forward passes; None: the frozen weights' dtype.
    `sharded`: the engine casts and shards the weights (ZeRO-3); until then they stay on the CPU as in their files.

    Raises:
        ConfigError: inconsistent settings or tokenizer. CheckpointError: mismatched weights.
    """
    check(settings)
    device = torch.device(device)
    place = torch.device("cpu") if sharded else device
    source, words = settings.adapter, tokenizer.vocabulary
    if source is not None and settings.lora is None:
        fields = recorded_lora(project_path(source))
        whole = {"path": source, "sizes": None, "adapter": None}
        settings = check(replace(settings, **({"lora": fields} if fields is not None else whole)))
    llama = _base(settings, tokenizer, place, sharded)
    rows = int(llama.config.vocab_size)
    force_special_ids(llama)
    fit_vocabulary(llama, tokenizer, settings.seed, settings.embedding_init)
    half = (precision or settings.dtype) != "fp32"
    llama.attentions = {
        packed: attention_kind(settings.attention, device, packed, half) for packed in (True, False)
    }
    try:  # `loss.use_attention` may change it per batch
        llama.set_attn_implementation(llama.attentions[True])
    except (
        ImportError,
        ValueError,
    ) as error:  # flash without its package or on unsupported hardware
        raise ConfigError(f"attention {settings.attention}: {first_line(error)}") from error
    model: Any = llama
    if settings.lora is not None:
        model = add_lora(llama, settings.lora, settings.seed)
        ends = {
            "embed_tokens": llama.get_input_embeddings(),
            "lm_head": llama.get_output_embeddings(),
        }
        for name, end in ends.items():
            if settings.train_embeddings and not hasattr(
                end, "modules_to_save"
            ):  # else PEFT trains a copy
                end.requires_grad_(True)
            if rows < words.size and not any(
                parameter.requires_grad for parameter in end.parameters()
            ):
                raise ConfigError(
                    f"The base gets new tokens, but {name} is not trained: add it to "
                    "lora.modules_to_save."
                )
        if source is not None:
            load_adapter(model, project_path(source))
    if settings.freeze_embeddings:
        if rows < words.size:
            raise ConfigError(
                "The base gets new tokens, but freeze_embeddings leaves their rows untrained."
            )
        llama.get_input_embeddings().requires_grad_(False)
    llama.model.register_forward_pre_hook(add_packed_lengths, with_kwargs=True)
    as_in_files = sharded and settings.lora is None
    for parameter in model.parameters():
        if (
            parameter.requires_grad and not as_in_files
        ):  # in place, so tied embeddings stay one parameter
            parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        enable = (
            getattr(llama, "activation_checkpointing_enable", None)
            or llama.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if settings.quantization is None:
        model.to(place)
    if settings.compile:
        for layer in llama.model.layers:
            layer.compile()
    return model.train()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint: the adapter (names of PEFT 0.4), or all weights, tied ones once."""
    if is_lora(model):
        return adapter_state(model)
    return {name: value.detach() for name, value in model.named_parameters()}


def load_trained(model: nn.Module, folder: Path) -> None:
    """Inverse of `save_trained`. Raises CheckpointError: no weights, or of another model."""
    if is_lora(model):
        load_adapter(model, folder)
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: contains no model*.safetensors; was it trained with LoRA?"
        )
    state = {name: value for file in files for name, value in load_state_dict(file).items()}
    copy_weights(trained_state(model), state, str(folder))


def save_trained(
    model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the trained weights as an adapter or a plain LLaMA folder; `state`: gathered weights (ZeRO-3)."""
    if is_lora(model):
        return save_adapter(model, folder, state)
    llama: Any = find_llama(model)
    llama.save_pretrained(folder, state_dict=None if state is None else dict(state))
    return Path(folder)


def fit_vocabulary(
    llama: Any, tokenizer: Any, seed: int = 0, embedding_init: str = "normal"
) -> None:
    """Resize the embeddings to the tokenizer's vocabulary; new rows as `LlmModelSettings.embedding_init`. Raises
    ConfigError: a model of another vocabulary."""
    words, rows = tokenizer.vocabulary, int(llama.config.vocab_size)
    if rows == words.size:
        return
    if not words.n_text <= rows < words.size:
        raise ConfigError(
            f"The model has {rows} tokens, but the tokenizer has {words.n_text} text tokens and "
            f"{words.size} tokens in all."
        )
    add_embedding_rows(llama, words.size, seed, embedding_init)


@torch.no_grad()
def add_embedding_rows(
    llama: Any, size: int, seed: int = 0, embedding_init: str = "normal"
) -> None:
    """Enlarge embeddings and head to `size` rows; the new ones as `LlmModelSettings.embedding_init`."""
    rows = len(llama.get_input_embeddings().weight)
    llama.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    spread = llama.config.initializer_range
    table, head = llama.get_input_embeddings().weight, llama.get_output_embeddings().weight
    for weight in (table,) if head is table else (table, head):
        if embedding_init == "normal":
            new = torch.empty(size - rows, weight.shape[1]).normal_(
                0.0, spread, generator=generator
            )
        else:
            new = weight[:rows].float().mean(0) * (1.0 if weight is table else 3.0)
        weight[rows:] = new.to(weight)


def attention_kind(name: str, device: torch.device, packed: bool = True, half: bool = True) -> str:
    """transformers' name of an attention implementation, for packed or padded rows. Padded rows need only a causal mask
    (fast in SDPA) and have many lengths, for each of which flex attention would be compiled. Flash attention needs half
    precision. Raises ConfigError: it is set for a run in fp32."""
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


def _base(settings: LlmModelSettings, tokenizer: Any, device: torch.device, sharded: bool) -> Any:
    """The LLaMA without adapters; in fp32 if fully trained, as in its files if `sharded`."""
    dtype = DTYPES["fp32" if settings.lora is None else settings.dtype or "bf16"]
    if settings.sizes is not None:
        return _random(settings.sizes, tokenizer.vocabulary.size, settings.seed).to(dtype)
    folder = project_path(str(settings.path))
    llama = load_llm(
        folder,
        device=device,
        dtype="auto" if sharded else dtype,
        quantization=settings.quantization,
    )
    llama.name_or_path = portable_path(folder)  # PEFT writes it into adapter_config.json
    return llama


def _random(sizes: Mapping[str, Any], words: int, seed: int) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {str(key): value for key, value in sizes.items() if key != "vocab_size"}
    check_keys(given, list(inspect.signature(LlamaConfig.__init__).parameters)[1:], "sizes")
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return LlamaForCausalLM(LlamaConfig(**{**given, **ids, "vocab_size": words}))
        except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
            raise ConfigError(f"sizes: {' '.join(str(error).split())}") from error
