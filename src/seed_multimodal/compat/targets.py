"""The originals' names in YAML files (`_target_`), by the part that such a file describes."""

from __future__ import annotations

from collections.abc import Mapping

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

_COMPAT = "seed_multimodal.compat"
_LLAMA_TOKENIZER = "seed_multimodal.language.llama_tokenizer:LlamaTokenizer.from_pretrained"
# Part → original names → our object (`module:attribute`) that `config.instantiate` calls; "": such
# files are read as settings only (`part_files`).
TARGETS: dict[str, dict[str, str]] = {
    "image_transform": {
        "models.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
        "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    },
    "seed_tokenizer": {
        "models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": (
            f"{_COMPAT}.seed_llama:SeedLlamaTokenizer.from_pretrained"
        ),
        "src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": (
            f"{_COMPAT}.seed_llama:SeedLlamaTokenizer.from_pretrained"
        ),
    },
    "tokenizer": {
        "transformers.LlamaTokenizer.from_pretrained": _LLAMA_TOKENIZER,
        _LLAMA_TOKENIZER.replace(":", "."): _LLAMA_TOKENIZER,
    },
    "llm": {
        "src.model.llama_xformer.LlamaForCausalLM.from_pretrained": (
            f"{_COMPAT}.seed_x:LlamaForCausalLM.from_pretrained"
        ),
        "transformers.LlamaForCausalLM.from_pretrained": (f"{_COMPAT}.part_files:language_model"),
        "transformers.AutoModelForCausalLM.from_pretrained": "",
        "models.model_tools.get_pretrained_llama_causal_model": (
            f"{_COMPAT}.part_files:language_model"
        ),
        "src.model.model_tools.get_pretrained_llama_causal_model": "",
        "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": (
            f"{_COMPAT}.seed_x:LlamaForCausalLM.from_pretrained"
        ),
    },
    # A builder that changes a language model.
    "changed_llm": {
        "src.model.peft_model.get_peft_model_with_resize_embedding": (
            f"{_COMPAT}.lora:seed_llama_lora"
        ),
        "src.model.peft_model.get_peft_model_with_trainable_embedding": "",
        "src.model.peft_model.get_frozen_embedding_model": "",
        "src.model.peft_model.get_learnable_image_embedding_model": "",
        "src.models.mllm.peft_models.get_peft_model_with_resize_embedding": (
            f"{_COMPAT}.lora:seed_x_lora"
        ),
        "src.models.mllm.peft_models.get_full_model_with_resize_embedding": "",
        "src.models.mllm.peft_models.get_model_with_resize_embedding": "",
    },
    "peft_config": {"peft.LoraConfig": f"{_COMPAT}.lora:lora_config"},
    "visual_encoder": {
        "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained": (
            f"{_COMPAT}.seed_x:VisionTransformerWithAttnPool.from_pretrained"
        ),
    },
    "agent": {
        "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained": (
            f"{_COMPAT}.seed_x:ContinuousLVLM.from_pretrained"
        ),
        "src.models.mllm.seed_x.ContinuousLVLM": f"{_COMPAT}.seed_x:ContinuousLVLM",
    },
    "adapter": {
        "src.models.detokenizer.adapter_modules.SDXLAdapter.from_pretrained": (
            f"{_COMPAT}.detokenizer:SDXLAdapter.from_pretrained"
        ),
        "src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage.from_pretrained": (
            f"{_COMPAT}.detokenizer:SDXLAdapterWithLatentImage.from_pretrained"
        ),
    },
    "discrete_model": {
        "src.models.tokenizer.discrete_models.DiscreteModleIdentity": (
            f"{_COMPAT}.seed_x:DiscreteModleIdentity"
        ),
    },
    # Inside of an agent, and of an adapter.
    "resampler": {
        "src.models.tokenizer.qwen_visual.Resampler": f"{_COMPAT}.seed_x:Resampler",
        "src.models.detokenizer.resampler.ResamplerXLV2": f"{_COMPAT}.detokenizer:ResamplerXLV2",
    },
}
ALIASES = {name: target for names in TARGETS.values() for name, target in names.items() if target}


def check_target(node: Mapping[str, object], label: str, *parts: str) -> None:
    """Raise ConfigError for a `_target_` that is no original name of one of the parts."""
    names = [name for part in parts for name in TARGETS[part]]
    target = node.get("_target_")
    if target not in names:
        raise ConfigError(
            f"{label}: _target_ {target!r} is not allowed{nearest(str(target), names)}; known "
            f"are {', '.join(names)}."
        )


def arguments_of(node: Mapping[str, object]) -> JsonObject:
    """The keys of a node, without Hydra's (which begin with an underscore) at any depth."""
    arguments: JsonObject = {}
    for key, value in node.items():
        if not str(key).startswith("_"):
            arguments[str(key)] = arguments_of(value) if isinstance(value, Mapping) else value
    return arguments
