"""LoRA through PEFT, as in the original: adapters on the linear layers, and fully trained modules.

Adapter files keep the names of PEFT 0.4, as in the original. Tied embeddings stay tied, with one
trained copy (by default PEFT trains two); files contain it under both names, because PEFT reads
both.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import seeded
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.language.lora import ADAPTER_FILES, check_mergeable
from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.state_dicts import copy_weights, load_state_dict, save_state_dict
from seed_multimodal.training.optimizers import trained_parameters
from seed_multimodal.weights.catalogue import ADAPTER_CONFIG
from seed_multimodal.weights.find import first_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

# Fields of `peft.LoraConfig` that scale B · A, as r and lora_alpha.
SCALE_FIELDS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Fields that a trained adapter's configuration determines.
RECORDED_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    *SCALE_FIELDS,
)
# Initial matrices that leave the base's weights as they are.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
# Names in adapter files.
ADAPTER_EMBEDDING = "base_model.model.model.embed_tokens.weight"
ADAPTER_HEAD = "base_model.model.lm_head.weight"
TARGET_MODULES = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
# Order matters: PEFT assigns a name to the first entry it contains, and `norm` is part of two
# others.
EMBEDDINGS = ("embed_tokens", "lm_head")
ALL_LINEAR = "all-linear"  # PEFT's name of all linear layers but the head
MODULES_TO_SAVE = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm")


def add_lora(llama: LlamaForCausalLM, fields: Mapping[str, Any], seed: int = 0) -> PeftModel:
    """Wrap a language model in a `PeftModel`, in place.

    Missing `fields` of `peft.LoraConfig` have the original's values; models other than LLaMA get
    matrices at all linear layers, and trained copies of the embeddings.

    Raises ConfigError: unknown or invalid fields, or some that would be trained but not merged.
    """
    from peft import LoraConfig, get_peft_model

    check_keys(fields, inspect.signature(LoraConfig).parameters, "lora")
    check_mergeable(fields, "lora", ConfigError)
    initialization = fields.get("init_lora_weights", True)
    if initialization not in INITIALIZATIONS:
        raise ConfigError(
            f"lora: init_lora_weights {initialization!r} is not supported, since it changes the "
            "base's weights or needs data; use true, false, gaussian or orthogonal."
        )
    values: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": list(TARGET_MODULES),
        "modules_to_save": list(MODULES_TO_SAVE),
    }
    if llama.config.model_type != "llama":  # other models have other layers
        values["target_modules"] = ALL_LINEAR
        values["modules_to_save"] = list(EMBEDDINGS)
    for key, value in fields.items():
        values[key] = list(value) if isinstance(value, list | tuple) else value

    # Tied embeddings get one trained copy. PEFT then changes `modules_to_save`, which is written
    # into files.
    modules_to_save = list(values["modules_to_save"] or ())
    saves_embeddings = bool({"embed_tokens", "lm_head"}.intersection(modules_to_save))
    is_tied = bool(llama.config.tie_word_embeddings and saves_embeddings)
    values["ensure_weight_tying"] = is_tied
    _check_modules(llama, values)
    try:
        config = LoraConfig(**values)
        with seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated names in transformers
            model = get_peft_model(llama, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error
    if is_tied:
        config.modules_to_save = modules_to_save
    return model


def _check_modules(llama: LlamaForCausalLM, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name of a module that PEFT would ignore."""
    names = [name for name, _ in llama.named_modules() if name]
    patterns = {
        "modules_to_save": r".*{}",
        "rank_pattern": r"(.*\.)?({})",
        "alpha_pattern": r"(.*\.)?({})",
    }
    for key, pattern in patterns.items():
        for entry in values.get(key) or ():
            if not any(re.fullmatch(pattern.format(entry), name) for name in names):
                last_parts = {name.rpartition(".")[2] for name in names}
                raise ConfigError(
                    f"lora: {key}: no module is named {entry}{nearest(entry, last_parts)}."
                )


def is_lora(model: nn.Module) -> bool:
    """Whether a model (not an engine's wrapper) is a PEFT model."""
    return hasattr(model, "peft_config")


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """All trained weights of a `PeftModel` with the names of PEFT 0.4; tied tensors once."""
    return {
        adapter_name(name): parameter.detach()
        for name, parameter in trained_parameters(model).items()
    }


def adapter_name(name: str) -> str:
    """A parameter's name in PEFT 0.4's files: without the adapter's name and PEFT's wrappers."""
    name = name.replace(".modules_to_save.default.", ".").removesuffix(".default")
    # DoRA's magnitudes were parameters.
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".default.", ".")


def adapter_settings(model: PeftModel) -> dict[str, Any]:
    """The content of `adapter_config.json`, for any PEFT version."""
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    return {**settings, "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}


def save_adapter(
    model: PeftModel, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`; `state`: gathered weights
    (ZeRO-3)."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)

    # The weights; PEFT reads tied embeddings under both names.
    tensors = dict(adapter_state(model) if state is None else state)
    if ADAPTER_EMBEDDING in tensors and model.get_base_model().config.tie_word_embeddings:
        tensors.setdefault(ADAPTER_HEAD, tensors[ADAPTER_EMBEDDING])
    save_state_dict(tensors, target / ADAPTER_FILES[0])

    # The configuration.
    text = json.dumps(adapter_settings(model), indent=2, sort_keys=True, default=str)
    (target / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return target


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter folder (also of PEFT 0.4) into a `PeftModel`.

    Raises CheckpointError: missing, or of another model, rank or scale.
    """
    file = first_file(folder, ADAPTER_FILES)
    if file is None:
        raise CheckpointError(f"{folder}: contains no adapter ({' or '.join(ADAPTER_FILES)}).")
    config_file = folder / ADAPTER_CONFIG
    if config_file.is_file():
        check_same_scale(model, read_json_object(config_file), config_file)
    weights = adapter_state(model)
    state = load_state_dict(file)
    # A model with tied embeddings has them once, a file under both names.
    if ADAPTER_HEAD not in weights and {ADAPTER_HEAD, ADAPTER_EMBEDDING} <= state.keys():
        if torch.equal(state[ADAPTER_EMBEDDING], state[ADAPTER_HEAD]):
            del state[ADAPTER_HEAD]
    copy_weights(weights, state, str(folder))


def recorded_lora(folder: Path) -> dict[str, Any] | None:
    """The LoRA fields of a trained adapter's folder; None if it has no adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    config = read_json_object(folder / ADAPTER_CONFIG)
    check_mergeable(config, str(folder / ADAPTER_CONFIG), CheckpointError)
    fields = {key: config[key] for key in RECORDED_FIELDS if config.get(key) is not None}
    fields["modules_to_save"] = config.get("modules_to_save") or []  # [] differs from unset
    return fields


def check_same_scale(model: PeftModel, recorded: Mapping[str, Any], label: Path) -> None:
    """Raise CheckpointError if recorded LoRA fields scale B · A differently from the model's, or
    are of another base."""
    check_mergeable(recorded, str(label))
    config = model.peft_config["default"]
    for key in ("r", "lora_alpha", *SCALE_FIELDS):
        if (recorded.get(key) or None) != (getattr(config, key) or None):
            raise CheckpointError(
                f"{label}: {key} is {recorded.get(key)}, but the model is set up with "
                f"{getattr(config, key)}."
            )
