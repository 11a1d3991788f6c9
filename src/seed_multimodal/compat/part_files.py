"""The originals' YAML files of a model's parts as settings: of a training's model, agent and vision
encoder, and of all parts of a SEED-X.

    files = {"tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml", …}
    SeedX.from_pretrained(config_of_files(files, tuned=True))

Their `_target_`s are compared with those of `targets.TARGETS` and never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from seed_multimodal.compat.targets import TARGETS, arguments_of, check_target
from seed_multimodal.config import instantiate, load_yaml
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig
from seed_multimodal.models.seed_x.modeling import AgentSettings
from seed_multimodal.models.seed_x.pipeline import AgentConfig
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.nn.vision.qwen import QwenVitConfig
from seed_multimodal.settings import check_keys, read_settings
from seed_multimodal.training.config import ConfigNode
from seed_multimodal.weights.catalogue import catalogue
from seed_multimodal.weights.find import locate_or_same

UNSET = (None, "", "???")
LLM_PATH = "pretrained_model_name_or_path"
PATH = "pretrained_model_path"
SDXL = catalogue().parts["sdxl"].folder
# Builders that change a language model → what they set, in our settings.
SETTINGS_OF_BUILDERS: dict[str, dict[str, Any]] = {
    "src.models.mllm.peft_models.get_peft_model_with_resize_embedding": {
        "train_embeddings": True,
        "embedding_init": "mean",
    },
    "src.model.peft_model.get_peft_model_with_trainable_embedding": {"train_embeddings": True},
    "src.model.peft_model.get_frozen_embedding_model": {"freeze_embeddings": True},
}
# Those that train a part of the embeddings alone.
NO_COUNTERPART = (
    "src.model.peft_model.get_learnable_image_embedding_model",
    "src.models.mllm.peft_models.get_model_with_resize_embedding",
)
# A key of the original vision encoder's file, which has a quotation mark too many.
STRAY_KEY = "image_start_id"


def read_part(file: str | Path) -> JsonObject:
    """A YAML file, in the current folder or below the repository root. Raises ConfigError."""
    return cast("JsonObject", OmegaConf.to_container(load_yaml(locate_or_same(file))))


def read_transform(file: str | Path) -> ImageTransform:
    """The transform that a YAML file describes. Raises ConfigError."""
    check_target(read_part(file), "image_transform", str(file))
    transform: ImageTransform = instantiate(locate_or_same(file))
    return transform


# ---- parts of a training


def model_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for an original model, or for a builder that changes one. Raises ConfigError."""
    target = str(node["_target_"])
    if target in NO_COUNTERPART:
        raise ConfigError(
            f"{label}: _target_ {target!r} has no counterpart: embeddings are not trained alone; "
            "use get_peft_model_with_resize_embedding with modules_to_save: [embed_tokens, "
            "lm_head] and a small r."
        )
    settings = {**llm_keys(node, label), **SETTINGS_OF_BUILDERS.get(target, {})}
    # A PEFT model is trained (`peft_config`), or loaded (`model_id`).
    is_peft = target.endswith("get_peft_model_with_resize_embedding")
    if is_peft and "lora" not in settings and "model_id" not in node:
        raise ConfigError(f"{label}: needs peft_config (to train) or model_id (a trained adapter).")
    if node.get("model_id") not in UNSET:
        settings["adapter"] = str(node["model_id"])
    return settings


def llm_keys(node: ConfigNode, label: str) -> JsonObject:
    """Path, precision and LoRA of an original language model."""
    if node.get("_target_") not in TARGETS["changed_llm"]:
        return base_keys(node, label)
    known_keys = ("model", "peft_config", "model_id", "tokenizer", "torch_dtype", "vocab_size")
    check_keys(arguments_of(node), known_keys, label)
    settings = {
        "dtype": node.get("torch_dtype"),
        **base_keys(node.get("model") or {}, f"{label}.model"),
    }
    lora = node.get("peft_config")
    if lora:
        check_target(lora, "peft_config", f"{label}.peft_config")
        settings["lora"] = arguments_of(lora)
    return settings


def base_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for the original's base model. Raises ConfigError."""
    check_target(node, "llm", label)
    bits = {"load_in_8bit": "8bit", "load_in_4bit": "4bit"}
    check_keys(arguments_of(node), (LLM_PATH, "torch_dtype", "low_cpu_mem_usage", *bits), label)
    if node.get(LLM_PATH) in UNSET:
        raise ConfigError(f"{label}: {LLM_PATH} is required: the folder of a LLaMA.")
    settings = {"path": str(node[LLM_PATH])}
    if node.get("torch_dtype"):
        settings["dtype"] = node["torch_dtype"]
    chosen = [bits[key] for key in bits if node.get(key)]
    if len(chosen) > 1:
        raise ConfigError(f"{label}: load_in_8bit and load_in_4bit exclude each other.")
    if chosen:
        settings["quantization"] = chosen[0]
    return settings


def agent_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for the original's agent. Raises ConfigError."""
    check_target(node, "agent", label)
    losses, settings = split_agent(node)
    settings["losses"] = losses
    path = settings.pop(PATH, None)
    if path:
        settings["path"] = path
    return settings


def split_agent(values: ConfigNode) -> tuple[JsonObject, JsonObject]:
    """The losses' settings of an agent's file, and its other keys.

    The originals' files have those settings at the top; ours, which win, have them below `losses`.
    """
    others = arguments_of(values)
    losses: JsonObject = {}
    for field in fields(AgentSettings):
        if field.name in others:
            losses[field.name] = others.pop(field.name)
    losses |= others.pop("losses", None) or {}
    return losses, others


def encoder_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for the original's vision encoder. Raises ConfigError."""
    check_target(node, "visual_encoder", label)
    # It has the sizes next to the path; `at_once` is ours, from an override.
    sizes = without_stray_key(arguments_of(node))
    settings: JsonObject = {"path": sizes.pop(PATH, None), "sizes": sizes}
    if "at_once" in sizes:
        settings["at_once"] = sizes.pop("at_once")
    return settings


def without_stray_key(values: Mapping[str, Any]) -> JsonObject:
    """The keys of a vision encoder's file."""
    return {key: value for key, value in values.items() if not key.startswith(STRAY_KEY)}


# ---- the parts of a SEED-X


def config_of_files(
    files: Mapping[str, str | Path],
    *,
    tuned: bool = True,
    sdxl: str | Path = SDXL,
) -> SeedXConfig:
    """The system that YAML files describe.

    files: path by part (`TARGETS`); images are drawn from features, without the discrete model.
    tuned: whether the language model follows instructions.
    sdxl: SDXL's diffusers folder, for the adapter.

    Raises:
        CheckpointError: missing parts, with instructions.
        ConfigError: a missing file, or one that describes another part.
    """
    # 1. Paths and sizes of the parts.
    paths: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for part, file in files.items():
        label = str(file)
        node = read_part(file)
        if part == "llm":
            keys = llm_keys(node, label)
            paths["llm"] = keys["path"]
            if "lora" in keys:
                sizes["lora"] = keys["lora"]
            continue
        check_target(node, part, label)
        if part == "image_transform":
            if read_transform(file).keep_ratio:
                raise ConfigError(f"{file}: SEED-X reads squares: set keep_ratio to False.")
        elif part != "discrete_model":
            key, path_key, read_sizes = _PARTS[part]
            arguments = arguments_of(node)
            paths[key] = arguments.pop(path_key, None)
            if not paths[key]:
                raise ConfigError(f"{label}: {path_key} is required.")
            sizes[key] = read_sizes(arguments, label)
    if "detokenizer" in paths:
        paths["sdxl"] = sdxl

    # 2. The system, without the other parts.
    config = SeedXConfig.find("seed-x-i", tuned=tuned, **paths)
    config.found = replace(config.found, name="SEED-X", sizes=sizes)
    for key in SeedXConfig.parts().keys() - paths.keys():
        setattr(config, key, None)
    return config.require(*paths)


def _tokenizer_sizes(arguments: JsonObject, label: str) -> None:
    check_keys(arguments, (), label)


def _encoder_sizes(arguments: JsonObject, label: str) -> QwenVitConfig:
    return read_settings(QwenVitConfig, without_stray_key(arguments), label)


def _agent_sizes(arguments: JsonObject, label: str) -> AgentConfig:
    losses, resamplers = split_agent(arguments)
    return read_settings(AgentConfig, {"settings": losses, **resamplers}, label)


def _adapter_sizes(arguments: JsonObject, label: str) -> ResamplerXLConfig:
    """Its stage follows from the weights; the other keys had their effect in training."""
    known_keys = ("resampler", "vit_down", "full_ft", "set_trainable_late")
    check_keys(arguments, known_keys, label)
    return read_settings(ResamplerXLConfig, arguments.get("resampler", {}), label)


# Part → its key in `SeedXConfig`, the key of its weights, and the reader of its sizes.
_PARTS = {
    "tokenizer": ("tokenizer", LLM_PATH, _tokenizer_sizes),
    "visual_encoder": ("vision", PATH, _encoder_sizes),
    "agent": ("agent", PATH, _agent_sizes),
    "adapter": ("detokenizer", PATH, _adapter_sizes),
}
