"""Which language model is trained and what of it: typed settings, from a YAML of ours or one of the original's.

The original's files nest a base model and a peft configuration under `_target_` names. One table maps each name to its
meaning; nothing is imported by a name in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from seed_multimodal.config import project_root
from seed_multimodal.device import DTYPES
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.llama import QUANTIZATIONS
from seed_multimodal.language.prompts import TUNED_TEMPLATES
from seed_multimodal.settings import check_keys, check_settings, nearest, read_settings, setting

if TYPE_CHECKING:
    from seed_multimodal.training.llm.trainer_settings import TrainerSettings

ATTENTIONS = {"auto": "auto", "sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
PEFT, BASE, LORA = "peft", "base", "lora"
SEED_X_PEFT = "src.models.mllm.peft_models.get_peft_model_with_resize_embedding"
TARGETS = {  # the original's dotted names -> what they stand for
    "src.model.peft_model.get_peft_model_with_resize_embedding": PEFT,
    "src.model.llama_xformer.LlamaForCausalLM.from_pretrained": BASE,
    "transformers.LlamaForCausalLM.from_pretrained": BASE,
    "transformers.AutoModelForCausalLM.from_pretrained": BASE,
    "src.model.model_tools.get_pretrained_llama_causal_model": BASE,
    "models.model_tools.get_pretrained_llama_causal_model": BASE,
    "peft.LoraConfig": LORA,
    SEED_X_PEFT: PEFT,
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": BASE,
}
_META = ("_target_", "_convert_", "_recursive_", "_partial_")
_PEFT_KEYS = ("model", "peft_config", "model_id", "tokenizer", "torch_dtype", "vocab_size")
_BASE_KEYS = ("pretrained_model_name_or_path", "torch_dtype", "low_cpu_mem_usage", "load_in_8bit", "load_in_4bit")


@dataclass
class LlmModelSettings:
    """A LLaMA and how it is trained.

    Attributes:
        path: folder of the base model; or
        sizes: a `LlamaConfig` to start from random weights; its vocabulary is the tokenizer's.
        dtype: precision of weights that stay frozen; None: the run's own, so that released fp16 weights stay exact in
            fp16 runs (see `for_precision`; outside of a run bf16). auto: bf16 on CUDA, else fp32.
        trained_dtype: precision of trained weights; `same` keeps them in `dtype` (for engines with fp32 copies of
            their own).
        quantization: None, 8bit or 4bit: the frozen base through bitsandbytes (QLoRA).
        fp8: products with the frozen matrices of the layers in FP8, by torchao (GPUs from Ada and Hopper on).
        attention: auto (packed rows on CUDA: flash if installed, else flex; padded rows and elsewhere: sdpa), sdpa,
            eager, flex or flash.
        lora: fields of `peft.LoraConfig`; None trains every weight.
        train_embeddings: embeddings and head are trained whole beside the LoRA, not as copies (SEED-X).
        adapter: folder of a trained adapter (or of trained weights) to resume from.
        seed: of new weights: random start, rows of new words, LoRA.
        template: prompts that the model is tuned with, vicuna or llama2; None: by its width, as at inference (LLaMA-2's
            for the 14B).
        gradient_checkpointing: False, True, or selective (every other layer).
        compile: torch.compile of each layer.
        codebook_start: tokenizer folder whose codebook the new image words start from.
    """

    path: str | None = None
    sizes: dict[str, Any] | None = None
    dtype: str | None = setting(None, choices=(*DTYPES, "auto"))
    trained_dtype: str = setting("fp32", choices=(*DTYPES, "same"))
    quantization: str | None = setting(None, choices=QUANTIZATIONS)
    fp8: bool = False
    attention: str = setting("auto", choices=tuple(ATTENTIONS))
    lora: dict[str, Any] | None = None
    train_embeddings: bool = False
    adapter: str | None = None
    seed: int = 0
    template: str | None = setting(None, choices=TUNED_TEMPLATES)
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    codebook_start: str | None = None


def read_model_settings(config: Mapping[str, Any], where: str = "model") -> LlmModelSettings:
    """Settings of a mapping: ours, or the original's with its `_target_`.

    Raises:
        ConfigError: an unknown key, value or `_target_`; neither path nor sizes; settings that exclude each other.
    """
    given = {str(key): value for key, value in config.items()}
    if "_target_" not in given:
        return check(read_settings(LlmModelSettings, given, where), where)
    own = {key: given.pop(key) for key in list(given) if key in LlmModelSettings.__dataclass_fields__}
    values = _released(given, where)
    return check(read_settings(LlmModelSettings, {**values, **own}, where), where)


def check(settings: LlmModelSettings, where: str = "model") -> LlmModelSettings:
    """The settings, if a model can be built from them.

    Raises:
        ConfigError: as `read_model_settings`.
    """
    check_settings(settings, where)
    if (settings.path is None) == (settings.sizes is None):
        raise ConfigError(f"{where}: give either path (the folder of a LLaMA) or sizes (to start from random weights).")
    whole = settings.lora is None and settings.adapter is None  # an adapter's folder holds its LoRA settings
    if settings.quantization is not None and whole:
        raise ConfigError(f"{where}: a {settings.quantization} base cannot be trained itself; give lora.")
    if settings.quantization is not None and settings.path is None:
        raise ConfigError(f"{where}: quantization needs a trained base (path), not random weights.")
    return settings


def for_precision(settings: LlmModelSettings, precision: str) -> tuple[LlmModelSettings, str]:
    """The settings of a model in a run of `precision`, and a remark if a dtype that was given cannot be kept ("")."""
    if precision != "fp32":
        return (settings if settings.dtype else replace(settings, dtype=precision)), ""
    # Without autocast all factors of a product must be of one type.
    remark = "" if settings.dtype in (None, "auto", "fp32") or settings.quantization is not None else (
        f"model: dtype {settings.dtype} needs trainer.precision bf16 or fp16; in this fp32 run the base is loaded in "
        "fp32.")
    return replace(settings, dtype="fp32", trained_dtype="fp32"), remark


def for_run(config: Mapping[str, Any], trainer: TrainerSettings, deepspeed: bool) -> tuple[LlmModelSettings, str]:
    """The settings of a mapping, adapted to the trainer and the engine, and a remark ("").

    Raises:
        ConfigError: as `read_model_settings`; a base that DeepSpeed cannot hold.
    """
    found = read_model_settings(config)
    if trainer.gradient_checkpointing is not None:
        found = replace(found, gradient_checkpointing=trainer.gradient_checkpointing)
    if trainer.compile is not None:
        found = replace(found, compile=trainer.compile)
    found, remark = for_precision(found, trainer.precision)
    if deepspeed and found.quantization is not None:
        raise ConfigError("A quantised base cannot be spread by DeepSpeed; use the plain engine.")
    return found, remark


def find_folder(path: str | Path) -> Path:
    """A path as it is, else below the project's root or the folders around it; unchanged if nowhere."""
    given, root = Path(path).expanduser(), project_root()
    return next((place for place in (given, root / given, *(folder / given for folder in root.parents))
                 if place.exists()), given)


def _released(node: dict[str, Any], where: str) -> dict[str, Any]:
    kind = _kind(node, where)
    if kind == BASE:
        return _base(node, where)
    if kind != PEFT:
        raise ConfigError(f"{where}: _target_ {node['_target_']!r} is not a language model.")
    check_keys(node, (*_META, *_PEFT_KEYS), where)
    base = node.get("model")
    if not isinstance(base, Mapping) or _kind(base, f"{where}.model") != BASE:
        raise ConfigError(f"{where}.model: needs the _target_ and the folder of a LLaMA.")
    values = _base(dict(base), f"{where}.model")
    values["train_embeddings"] = node["_target_"] == SEED_X_PEFT
    if _set(node.get("torch_dtype")):
        values.setdefault("dtype", str(node["torch_dtype"]))
    peft, adapter = node.get("peft_config"), node.get("model_id")
    if isinstance(peft, Mapping):
        if _kind(peft, f"{where}.peft_config") != LORA:
            raise ConfigError(f"{where}.peft_config: _target_ must be peft.LoraConfig.")
        values["lora"] = {str(key): value for key, value in peft.items() if key not in _META}
    elif "model_id" not in node:
        raise ConfigError(f"{where}: needs peft_config (to train) or model_id (a trained adapter).")
    if _set(adapter):
        values["adapter"] = str(adapter)
    return values


def _base(node: dict[str, Any], where: str) -> dict[str, Any]:
    check_keys(node, (*_META, *_BASE_KEYS), where)
    if not _set(node.get("pretrained_model_name_or_path")):
        raise ConfigError(f"{where}: pretrained_model_name_or_path is needed: the folder of a LLaMA.")
    values: dict[str, Any] = {"path": str(node["pretrained_model_name_or_path"])}
    if _set(node.get("torch_dtype")):
        values["dtype"] = str(node["torch_dtype"])
    if node.get("load_in_8bit") or node.get("load_in_4bit"):
        values["quantization"] = "8bit" if node.get("load_in_8bit") else "4bit"
    return values


def _kind(node: Mapping[str, Any], where: str) -> str:
    name = node.get("_target_")
    if name not in TARGETS:
        raise ConfigError(f"{where}: _target_ {name!r} is not allowed{nearest(str(name), TARGETS)}; known are "
                          f"{', '.join(TARGETS)}.")
    return TARGETS[name]


def _set(value: Any) -> bool:
    """Whether a key has a value: `???` stands for one that is still missing."""
    return value not in (None, "", "???")
