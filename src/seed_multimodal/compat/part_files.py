"""The originals' YAML files of a model's parts as settings: of a training's model, agent and vision
encoder, and of all parts of a SEED-X or a SEED-LLaMA.

    files = {"tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml", …}
    MultimodalSystem.from_pretrained(config_of_files(files, tuned=True))

Their `_target_`s are compared with those of `targets.TARGETS` and never imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer, tokenizer_config
from seed_multimodal.compat.targets import TARGETS, arguments_of, check_target
from seed_multimodal.config import load_yaml, read_table
from seed_multimodal.device import FP16_WITH_8BIT, choose_device
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.models.seed.spec import BICUBIC, SeedLlamaConfig
from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig
from seed_multimodal.models.seed_x.modeling import AgentSettings
from seed_multimodal.models.seed_x.pipeline import AgentConfig
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.nn.vision.qwen import QwenVitConfig
from seed_multimodal.pipelines.config import Found
from seed_multimodal.settings import check_keys, read_settings
from seed_multimodal.training.config import ConfigNode
from seed_multimodal.weights.catalogue import catalogue
from seed_multimodal.weights.find import find_path, locate_or_same

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

    from seed_multimodal.language.llm import LanguageModel

UNSET = (None, "", "???")
LLM_PATH = "pretrained_model_name_or_path"
PATH = "pretrained_model_path"
BITS = {"load_in_8bit": "8bit", "load_in_4bit": "4bit"}  # flags → our quantization
SDXL = catalogue().parts["sdxl"].folder
# Builders that change a language model: what they set, and those without counterpart.
_BUILDERS = read_table(__file__)
# A key of the original vision encoder's file, which has a quotation mark too many.
STRAY_KEY = "image_start_id"


def read_part(file: str | Path, *parts: str) -> JsonObject:
    """A YAML file, in the current folder or below the repository root.

    parts: it must describe one of them.
    Raises ConfigError.
    """
    node = cast("JsonObject", OmegaConf.to_container(load_yaml(locate_or_same(file))))
    check_target(node, str(file), *parts)
    return node


# ---- parts of a training


def model_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for an original model, or for a builder that changes one. Raises ConfigError."""
    target = str(node["_target_"])
    if target in _BUILDERS["no_counterpart"]:
        raise ConfigError(
            f"{label}: _target_ {target!r} has no counterpart: embeddings are not trained alone; "
            "use get_peft_model_with_resize_embedding with modules_to_save: [embed_tokens, "
            "lm_head] and a small r."
        )
    settings = {**llm_keys(node, label), **_BUILDERS["settings"].get(target, {})}
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
        check_target(lora, f"{label}.peft_config", "peft_config")
        settings["lora"] = arguments_of(lora)
    return settings


def base_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for the original's base model. Raises ConfigError."""
    check_target(node, label, "llm")
    known_keys = (LLM_PATH, "torch_dtype", "low_cpu_mem_usage", *BITS)
    check_keys(arguments_of(node), known_keys, label)
    if node.get(LLM_PATH) in UNSET:
        raise ConfigError(f"{label}: {LLM_PATH} is required: the folder of a LLaMA.")
    settings = {"path": str(node[LLM_PATH])}
    if node.get("torch_dtype"):
        settings["dtype"] = node["torch_dtype"]
    quantization = _quantization(node, label)
    if quantization:
        settings["quantization"] = quantization
    return settings


def _quantization(flags: Mapping[str, Any], label: str) -> str | None:
    """What `BITS` ask for. Raises ConfigError: both."""
    chosen = [kind for flag, kind in BITS.items() if flags.get(flag)]
    if len(chosen) > 1:
        raise ConfigError(f"{label}: {' and '.join(BITS)} exclude each other.")
    return chosen[0] if chosen else None


def language_model(
    pretrained_model_name_or_path: str,
    torch_dtype: str | TorchDtype = "auto",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
    device: str = "auto",
    quantization: str | None = None,
) -> LanguageModel:
    """A LLaMA from a folder or hub name, as `get_pretrained_llama_causal_model` and
    `from_pretrained` of the originals; `device_map` (`"cuda:0"`) is the originals' `device`."""
    flags = {"load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
    quantization = _quantization(flags, pretrained_model_name_or_path) or quantization
    if device_map not in (None, "auto"):
        device = device_map
    # With 8-bit weights bitsandbytes computes in float16.
    fp16 = FP16_WITH_8BIT if quantization == "8bit" else ""
    runtime = choose_device(device, torch_dtype, fp16=fp16)
    return load_llm_or_adapter(
        find_path(pretrained_model_name_or_path) or pretrained_model_name_or_path,
        device=runtime.device,
        dtype=runtime.dtype,
        quantization=quantization,
    )


def agent_keys(node: ConfigNode, label: str) -> JsonObject:
    """Our settings for the original's agent. Raises ConfigError."""
    check_target(node, label, "agent")
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
    check_target(node, label, "visual_encoder")
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
    files: Mapping[str, str | Path], *, tuned: bool = True, sdxl: str | Path = SDXL
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
        if part == "llm":
            keys = llm_keys(read_part(file, "llm", "changed_llm"), label)
            paths["llm"] = keys["path"]
            if "lora" in keys:
                sizes["lora"] = keys["lora"]
            continue
        arguments = arguments_of(read_part(file, part))
        if part == "image_transform":
            if arguments.get("keep_ratio", True):
                raise ConfigError(f"{file}: SEED-X reads squares: set keep_ratio to False.")
        elif part != "discrete_model":
            key, path_key = _SEED_X_PARTS[part]
            paths[key] = arguments.pop(path_key, None)
            if not paths[key]:
                raise ConfigError(f"{label}: {path_key} is required.")
            sizes[key] = _sizes(part, arguments, label)
    if "detokenizer" in paths:
        paths["sdxl"] = sdxl

    # 2. The system, without the other parts.
    config = SeedXConfig.find("seed-x-i", tuned=tuned, **paths)
    config.found = replace(config.found, name="SEED-X", sizes=sizes)
    for key in SeedXConfig.parts().keys() - paths.keys():
        setattr(config, key, None)
    return config.require(*paths)


# Part → its key in `SeedXConfig`, and the key of its weights.
_SEED_X_PARTS = {
    "tokenizer": ("tokenizer", LLM_PATH),
    "visual_encoder": ("vision", PATH),
    "agent": ("agent", PATH),
    "adapter": ("detokenizer", PATH),
}


def _sizes(part: str, arguments: JsonObject, label: str) -> object:
    """The sizes of a part, from the keys of its file but that of its weights."""
    if part == "visual_encoder":
        return read_settings(QwenVitConfig, without_stray_key(arguments), label)
    if part == "agent":
        losses, resamplers = split_agent(arguments)
        return read_settings(AgentConfig, {"settings": losses, **resamplers}, label)
    if part == "adapter":
        # Its stage follows from the weights; the other keys had their effect in training.
        known_keys = ("resampler", "vit_down", "full_ft", "set_trainable_late")
        check_keys(arguments, known_keys, label)
        return read_settings(ResamplerXLConfig, arguments.get("resampler", {}), label)
    check_keys(arguments, (), label)
    return None


# ---- the parts of a SEED-LLaMA


def seed_llama_of_files(
    files: Mapping[str, str | Path | None], dtype: str = "auto", quantization: str | None = None
) -> tuple[SeedLlamaConfig, JsonObject]:
    """The system that YAML files (or folders) describe, and the keywords of
    `MultimodalSystem.from_pretrained` that they set.

    files: tokenizer; if any, llm and image_transform.
    dtype, quantization: override those of the files.

    Raises ConfigError: a missing file, or one that describes another part.
    """
    # 1. The image tokenizer; a folder alone resizes images as in its evaluation.
    tokenizer = files["tokenizer"]
    assert tokenizer is not None
    label = str(tokenizer)
    keys: JsonObject = {LLM_PATH: tokenizer}
    is_folder = os.path.isdir(tokenizer)
    if not is_folder:
        keys = arguments_of(read_part(tokenizer, "seed_tokenizer"))
    check_keys(keys, signature(SeedLlamaTokenizer.from_pretrained).parameters, label)
    if not keys.get(LLM_PATH):
        raise ConfigError(f"{label}: {LLM_PATH} is required: the folder of a SEED-2 tokenizer.")
    config = tokenizer_config(keys[LLM_PATH], keys.get("diffusion_path"))
    if is_folder:
        config.transform = dict(BICUBIC)
    if not keys.get("diffusion_path") and not config.has("detokenizer"):
        config.detokenizer = None  # such a system reads images
    image_dtype = keys.get("dtype", "auto" if keys.get("fp16", True) else "float32")

    # 2. How images are resized.
    transform = files.get("image_transform")
    if transform:
        arguments = arguments_of(read_part(transform, "image_transform"))
        config.transform = {"keep_ratio": True, **arguments}
        config.image_size = arguments.get("image_size")
        config.check(str(transform))

    # 3. The language model; its device is that of a flag.
    config.llm = None
    llm: JsonObject = {"dtype": image_dtype}
    model = files.get("llm")
    if model:
        llm = {"path": model}
        if not os.path.isdir(model):
            node = read_part(model, "llm")
            devices = ("device_map", "device")
            node = {key: value for key, value in node.items() if key not in devices}
            llm = base_keys(node, str(model))
        config.llm = find_path(llm["path"]) or Path(llm["path"])
        if config.has("llm"):
            config.template = SeedLlamaConfig.find(config.llm).template
        config.found = Found(Path(model).name.removesuffix(".yaml"))

    # 4. Precision.
    options: JsonObject = {"dtype": dtype, "image_dtype": dtype}
    if dtype == "auto":
        options = {"dtype": llm.get("dtype", "auto"), "image_dtype": image_dtype}
    options["quantization"] = quantization or llm.get("quantization")
    return config, options
