"""LoRA through PEFT, as in the original: adapters on the linear layers, and fully trained modules.

Adapter files keep the names of PEFT 0.4, as in the original. Tied embeddings stay tied, with one trained copy (by
default PEFT trains two); files contain it under both names, because PEFT reads both.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.hub import ADAPTER_CONFIG, first_file
from seed_multimodal.language.lora import ADAPTER_FILES
from seed_multimodal.settings import check_keys
from seed_multimodal.weights import load_state_dict, save_state_dict

SHAPING = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)  # scale B · A, as r and lora_alpha
RECORDED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    *SHAPING,
)
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
TARGET_MODULES = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
# Order matters: PEFT assigns a name to the first entry it contains, and `norm` is part of two others.
MODULES_TO_SAVE = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm")


def add_lora(llama: Any, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """Wrap a LLaMA in a `PeftModel`, in place. Missing `fields` of `peft.LoraConfig` have the original's values. Raises
    ConfigError: unknown or invalid fields."""
    from peft import LoraConfig, get_peft_model

    given = {
        key: list(value) if isinstance(value, list | tuple) else value
        for key, value in fields.items()
    }
    check_keys(given, inspect.signature(LoraConfig).parameters, "lora")
    values: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": list(TARGET_MODULES),
        "modules_to_save": list(MODULES_TO_SAVE),
        **given,
    }
    saved = list(values["modules_to_save"] or ())
    tied = bool(llama.config.tie_word_embeddings and {"embed_tokens", "lm_head"} & {*saved})
    values["ensure_weight_tying"] = tied
    try:
        config = LoraConfig(**values)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated names in transformers
            torch.manual_seed(seed)
            model = get_peft_model(llama, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error
    if tied:
        config.modules_to_save = saved
    return model


def is_lora(model: Any) -> bool:
    """Whether a model (not an engine's wrapper) is a PEFT model."""
    return hasattr(model, "peft_config")


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Trained weights of a `PeftModel` with the names of PEFT 0.4; no copies, tied tensors once."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = model.get_base_model()
    if base.config.tie_word_embeddings:
        found = {
            name: value
            for name, value in found.items()
            if not (
                name.endswith("lm_head.weight")
                and base.lm_head.weight is base.model.embed_tokens.weight
            )
        }
    return {name: value.detach() for name, value in found.items()}


def adapter_settings(model: Any) -> dict[str, Any]:
    """The content of `adapter_config.json`, for any PEFT version."""
    values = model.peft_config["default"].to_dict()
    values = {
        key: sorted(value) if isinstance(value, set) else value for key, value in values.items()
    }
    return {**values, "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}


def save_adapter(model: Any, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`; `state`: gathered weights (ZeRO-3)."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(adapter_state(model) if state is None else state)
    if EMBEDDING in tensors and model.get_base_model().config.tie_word_embeddings:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    save_state_dict(tensors, target / ADAPTER_FILES[0])
    text = json.dumps(adapter_settings(model), indent=2, sort_keys=True, default=str)
    (target / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return target


def load_adapter(model: Any, folder: Path) -> None:
    """Load an adapter folder (also of PEFT 0.4) into a `PeftModel`. Raises CheckpointError: missing, or of another
    model, rank or scale."""
    file = first_file(folder, ADAPTER_FILES)
    if file is None:
        raise CheckpointError(f"{folder}: contains no adapter ({' or '.join(ADAPTER_FILES)}).")
    if (folder / ADAPTER_CONFIG).is_file():
        check_same_scale(model, read_json_object(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    own, state = adapter_state(model), load_state_dict(file)
    if (
        HEAD not in own
        and {HEAD, EMBEDDING} <= state.keys()
        and torch.equal(state[EMBEDDING], state[HEAD])
    ):
        del state[HEAD]
    copy_weights(own, state, str(folder))


@torch.no_grad()
def copy_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors by name. Raises CheckpointError: missing or unknown tensors, or of another size."""
    for names, what in (
        (own.keys() - state.keys(), "missing"),
        (state.keys() - own.keys(), "unknown to the model"),
    ):
        if names:
            raise CheckpointError(
                f"{where}: {len(names)} tensors are {what}: {sorted(names)[0]!r}"
                f"{' …' if len(names) > 1 else ''}."
            )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise CheckpointError(
                f"{where}: {name!r} is {tuple(state[name].shape)}, but the model needs "
                f"{tuple(value.shape)}."
            )
        value.copy_(state[name])


def recorded_lora(folder: Path) -> dict[str, Any] | None:
    """The LoRA fields of a trained adapter's folder; None if it has no adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    values = read_json_object(folder / ADAPTER_CONFIG)
    found = {key: values[key] for key in RECORDED if values.get(key) is not None}
    return {
        **found,
        "modules_to_save": values.get("modules_to_save") or [],
    }  # [] differs from unset


def check_same_scale(model: Any, there: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if recorded LoRA fields scale B · A differently from the model's."""
    here = model.peft_config["default"]
    for key in ("r", "lora_alpha", *SHAPING):
        if (there.get(key) or None) != (getattr(here, key) or None):
            raise CheckpointError(
                f"{where}: {key} is {there.get(key)}, but the model is set up with "
                f"{getattr(here, key)}."
            )
