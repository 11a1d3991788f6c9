"""Settings of a language model's run: model, trainer and prompt template.

A model's YAML is ours or an original one, which nests a base and a PEFT configuration under `_target_` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seed_multimodal.config import project_root
from seed_multimodal.device import DTYPES
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.llama import BITSANDBYTES
from seed_multimodal.language.prompts import TUNED_TEMPLATES, template_for
from seed_multimodal.settings import check_keys, check_settings, nearest, read_settings, setting
from seed_multimodal.training.config import TrainerSettings

ATTENTIONS = {
    "auto": "auto",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}
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
    "embeddings are not trained alone; use get_peft_model_with_resize_embedding with modules_to_save: [embed_tokens, "
    "lm_head] and a small r",
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


@dataclass
class LlmModelSettings:
    """A LLaMA and how it is trained. `dtype`: of frozen weights, by default the run's precision, so that original fp16
    weights stay exact in fp16 runs; trained weights are kept in fp32."""

    path: str | None = None  # folder of the base model, or
    sizes: dict[str, Any] | None = (
        None  # a `LlamaConfig` for random weights, with the tokenizer's vocabulary
    )
    dtype: str | None = setting(None, choices=tuple(DTYPES))
    quantization: str | None = setting(
        None, choices=(None, *BITSANDBYTES)
    )  # of the frozen base (QLoRA)
    # auto: packed rows on CUDA by flash if installed, else by flex; padded rows and elsewhere by sdpa
    attention: str = setting("auto", choices=tuple(ATTENTIONS))
    lora: dict[str, Any] | None = None  # fields of `peft.LoraConfig`; None trains every weight
    train_embeddings: bool = (
        False  # train embeddings and head with the LoRA, not as copies (SEED-X)
    )
    freeze_embeddings: bool = (
        False  # of full training: all weights but the input embeddings are trained
    )
    # Rows of new tokens. normal: N(0, initializer_range); mean: the old rows' mean, 3 times it in the head (SEED-X)
    embedding_init: str = setting("normal", choices=("normal", "mean"))
    adapter: str | None = None  # folder of a trained adapter (or weights) to start from
    seed: int = 0  # of new weights: random initialization, new token embeddings, LoRA
    template: str | None = setting(
        None, choices=TUNED_TEMPLATES
    )  # None: by the model's width, as at inference
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of each layer


@dataclass(kw_only=True)
class LlmTrainerSettings(TrainerSettings):
    """Settings of a language model's training."""

    # tokens: mean over all learned tokens of a step (default for packed data); batch: mean of the micro-batches'
    # means, as in the original
    loss_average: str | None = setting(None, choices=("tokens", "batch"))
    text_weight: float = setting(1.0, minimum=0)
    image_weight: float = setting(1.0, minimum=0)
    eval_steps: int = setting(0, minimum=0)  # 0 never evaluates
    eval_batches: int = setting(16, minimum=1)  # evaluation micro-batches per process
    sample_steps: int | None = setting(
        None, minimum=0
    )  # write answers to `samples/` (0: never; None: `save_steps`)
    peak_tflops: float | None = setting(
        None, above=0
    )  # of one device, for the MFU; None: by device name
    gradient_checkpointing: bool | None = None  # overrides the model's, as `compile`
    compile: bool | None = None


@dataclass
class TokenizerSettings:
    """The tokenizer's folder."""

    pretrained_model_name_or_path: str


def read_tokenizer(config: Mapping[str, Any], where: str = "tokenizer") -> Path:
    """The folder in a mapping, ours or the original's. Raises ConfigError: none is set."""
    given = {
        key: value
        for key, value in config.items()
        if key in TokenizerSettings.__dataclass_fields__ and value
    }
    return project_path(
        read_settings(TokenizerSettings, given, where).pretrained_model_name_or_path
    )


def read_model_settings(config: Mapping[str, Any], where: str = "model") -> LlmModelSettings:
    """Settings from a mapping: ours, or the original's with its `_target_`. Raises ConfigError."""
    own = {str(key): value for key, value in config.items()}
    given = {
        key: own.pop(key) for key in list(own) if key not in LlmModelSettings.__dataclass_fields__
    }
    values = _original(given, where) if "_target_" in given else given
    return check(read_settings(LlmModelSettings, {**values, **own}, where), where)


def check(settings: LlmModelSettings, where: str = "model") -> LlmModelSettings:
    """The settings, after consistency checks. Raises ConfigError."""
    check_settings(settings, where)
    if (settings.path is None) == (settings.sizes is None):
        raise ConfigError(
            f"{where}: set either path (the folder of a LLaMA) or sizes (for random weights)."
        )
    if settings.quantization is not None and settings.path is None:
        raise ConfigError(f"{where}: quantization needs a trained base (path), not random weights.")
    if settings.quantization is not None and settings.lora is None and settings.adapter is None:
        raise ConfigError(f"{where}: a {settings.quantization} base cannot be trained; set lora.")
    if settings.freeze_embeddings and settings.lora is not None:
        raise ConfigError(
            f"{where}: freeze_embeddings is for full training; with lora, leave embed_tokens out of "
            "lora.modules_to_save."
        )
    return settings


def adapt_to_run(
    model: LlmModelSettings, trainer: LlmTrainerSettings, deepspeed: bool
) -> LlmModelSettings:
    """The settings adapted to trainer and engine; without autocast (fp32) all weights must have one dtype. Raises
    ConfigError."""
    if deepspeed and model.quantization is not None:
        raise ConfigError("DeepSpeed does not support a quantized base; use the plain engine.")
    changes = {
        key: value
        for key in ("gradient_checkpointing", "compile")
        if (value := getattr(trainer, key)) is not None
    }
    dtype = "fp32" if trainer.precision == "fp32" else model.dtype or trainer.precision
    return replace(model, dtype=dtype, **changes)


def project_path(path: str | Path) -> Path:
    """A path as is, else below the project root or its parents; unchanged if not found."""
    given, root = Path(path).expanduser(), project_root()
    return next(
        (
            place
            for place in (given, root / given, *(folder / given for folder in root.parents))
            if place.exists()
        ),
        given,
    )


def template_of(model: LlmModelSettings) -> str:
    """The prompt template of a model: configured, or by its width, as at inference."""
    config = project_path(str(model.path)) / "config.json"
    sizes = (
        read_json_object(config, ConfigError)
        if model.path is not None and config.is_file()
        else model.sizes or {}
    )
    return model.template or template_for(sizes.get("hidden_size"))


def _original(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our settings for an original file: a base, or PEFT around one."""
    target = str(node["_target_"])
    if target in NO_COUNTERPART:
        raise ConfigError(
            f"{where}: _target_ {target!r} has no counterpart: {NO_COUNTERPART[target]}."
        )
    if target in OTHER_MODELS and not node.get("peft_config"):
        check_keys(node, (*_META, *_PEFT_KEYS), where)
        return {**_base(node.get("model") or {}, f"{where}.model"), **OTHER_MODELS[target]}
    if target not in (*PEFT_TARGETS, *OTHER_MODELS):
        return _base(node, where)
    check_keys(node, (*_META, *_PEFT_KEYS), where)
    base, peft, adapter = (node.get(key) for key in ("model", "peft_config", "model_id"))
    values = {
        "dtype": node.get("torch_dtype"),
        **_base(base or {}, f"{where}.model"),
        **OTHER_MODELS.get(target, {}),
    }
    if target == SEED_X_PEFT:
        values |= {"train_embeddings": True, "embedding_init": "mean"}
    if peft:
        check_target(peft, LORA_TARGETS, f"{where}.peft_config")
        values["lora"] = {str(key): value for key, value in peft.items() if key not in _META}
    elif "model_id" not in node:
        raise ConfigError(f"{where}: needs peft_config (to train) or model_id (a trained adapter).")
    return {**values, "adapter": None if adapter in (None, "", "???") else str(adapter)}


def _base(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_target(node, (*BASE_TARGETS, *PEFT_TARGETS), where)
    check_keys(node, (*_META, *_BASE_KEYS), where)
    path = node.get("pretrained_model_name_or_path")
    if path in (None, "", "???"):  # ???: not set
        raise ConfigError(
            f"{where}: pretrained_model_name_or_path is required: the folder of a LLaMA."
        )
    quantization = next((bits for bits in ("8bit", "4bit") if node.get(f"load_in_{bits}")), None)
    given = {"dtype": node.get("torch_dtype"), "quantization": quantization}
    return {"path": str(path), **{key: value for key, value in given.items() if value}}


def check_target(node: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for a `_target_` not in `known`; targets are never imported."""
    if (name := node.get("_target_")) not in known:
        raise ConfigError(
            f"{where}: _target_ {name!r} is not allowed{nearest(str(name), known)}; known are "
            f"{', '.join(known)}."
        )
