"""The originals' files of a training's model, agent and vision encoder, with the keys of ours.

A model's file nests a base and a PEFT configuration. Their `_target_`s are compared with the known
names and never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seed_multimodal.compat.seed_x_yaml import (
    PATH,
    agent,
    split_agent,
    targets_of,
    vision_encoder,
    without_stray_key,
)
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.training.config import ConfigNode

SEED_X_PEFT = "src.models.mllm.peft_models.get_peft_model_with_resize_embedding"
# The original's targets: PEFT model, base model, PEFT configuration.
PEFT_TARGETS = ("src.model.peft_model.get_peft_model_with_resize_embedding", SEED_X_PEFT)
# Original builders of models that no published file names: our settings, over those of their base.
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "src.model.peft_model.get_frozen_embedding_model": {"freeze_embeddings": True},
    "src.model.peft_model.get_peft_model_with_trainable_embedding": {"train_embeddings": True},
    "src.models.mllm.peft_models.get_full_model_with_resize_embedding": {},
}
# … and what to use in place of those that train a part of the embeddings alone.
NO_COUNTERPART = dict.fromkeys(
    (
        "src.model.peft_model.get_learnable_image_embedding_model",
        "src.models.mllm.peft_models.get_model_with_resize_embedding",
    ),
    "embeddings are not trained alone; use get_peft_model_with_resize_embedding with "
    "modules_to_save: [embed_tokens, lm_head] and a small r",
)
BASE_TARGETS = (
    "src.model.llama_xformer.LlamaForCausalLM.from_pretrained",
    "transformers.LlamaForCausalLM.from_pretrained",
    "transformers.AutoModelForCausalLM.from_pretrained",
    "models.model_tools.get_pretrained_llama_causal_model",
    "src.model.model_tools.get_pretrained_llama_causal_model",
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained",
)
LORA_TARGETS = ("peft.LoraConfig",)
_META = ("_target_", "_convert_", "_recursive_", "_partial_")
_PEFT_KEYS = ("model", "peft_config", "model_id", "tokenizer", "torch_dtype", "vocab_size")
_BASE_KEYS = (
    "pretrained_model_name_or_path",
    "torch_dtype",
    "low_cpu_mem_usage",
    "load_in_8bit",
    "load_in_4bit",
)
AGENT_TARGETS = (*targets_of(agent), "src.models.mllm.seed_x.ContinuousLVLM")
ENCODER_TARGETS = targets_of(vision_encoder)


def model_keys(node: ConfigNode, label: str) -> dict[str, Any]:
    """Our settings for an original model: a base, or PEFT around one. Raises ConfigError."""
    target = str(node["_target_"])
    if target in NO_COUNTERPART:
        raise ConfigError(
            f"{label}: _target_ {target!r} has no counterpart: {NO_COUNTERPART[target]}."
        )
    if target not in (*PEFT_TARGETS, *OTHER_MODELS):
        return _base_keys(node, label)

    # The base, with what the original's builder sets.
    check_keys(node, (*_META, *_PEFT_KEYS), label)
    base = _base_keys(node.get("model") or {}, f"{label}.model")
    peft = node.get("peft_config")
    if target in OTHER_MODELS and not peft:
        return {**base, **OTHER_MODELS[target]}
    settings = {"dtype": node.get("torch_dtype"), **base, **OTHER_MODELS.get(target, {})}
    if target == SEED_X_PEFT:
        settings["train_embeddings"] = True
        settings["embedding_init"] = "mean"

    # A PEFT model is trained (`peft_config`), or loaded (`model_id`, ???: not set).
    if peft:
        _check_target(peft, LORA_TARGETS, f"{label}.peft_config")
        settings["lora"] = {str(key): value for key, value in peft.items() if key not in _META}
    elif "model_id" not in node:
        raise ConfigError(f"{label}: needs peft_config (to train) or model_id (a trained adapter).")
    adapter = node.get("model_id")
    settings["adapter"] = None if adapter in (None, "", "???") else str(adapter)
    return settings


def _base_keys(node: ConfigNode, label: str) -> dict[str, Any]:
    """Our settings for the original's base model."""
    _check_target(node, (*BASE_TARGETS, *PEFT_TARGETS), label)
    check_keys(node, (*_META, *_BASE_KEYS), label)
    path = node.get("pretrained_model_name_or_path")
    if path in (None, "", "???"):  # ???: not set
        raise ConfigError(
            f"{label}: pretrained_model_name_or_path is required: the folder of a LLaMA."
        )
    settings = {"path": str(path)}
    if node.get("torch_dtype"):
        settings["dtype"] = node["torch_dtype"]
    for bits in ("4bit", "8bit"):  # 8bit wins
        if node.get(f"load_in_{bits}"):
            settings["quantization"] = bits
    return settings


def agent_keys(values: ConfigNode, label: str) -> dict[str, Any]:
    """Our settings for the original's agent. Raises ConfigError."""
    _check_target(values, AGENT_TARGETS, label)
    losses, settings = split_agent(values)
    del settings["_target_"]
    settings["losses"] = losses
    path = settings.pop(PATH, None)
    if path:
        settings["path"] = path
    return settings


def encoder_keys(values: ConfigNode, label: str) -> dict[str, Any]:
    """Our settings for the original's vision encoder. Raises ConfigError."""
    _check_target(values, ENCODER_TARGETS, label)
    # It has the sizes next to the path; `at_once` is ours, from an override.
    sizes = without_stray_key(values)
    settings: dict[str, Any] = {"path": sizes.pop(PATH, None), "sizes": sizes}
    for name in _META:
        sizes.pop(name, None)
    if "at_once" in sizes:
        settings["at_once"] = sizes.pop("at_once")
    return settings


def _check_target(node: ConfigNode, allowed: Sequence[str], label: str) -> None:
    """Raise ConfigError for a `_target_` that is not allowed; targets are never imported."""
    target = node.get("_target_")
    if target not in allowed:
        raise ConfigError(
            f"{label}: _target_ {target!r} is not allowed{nearest(str(target), allowed)}; known "
            f"are {', '.join(allowed)}."
        )
