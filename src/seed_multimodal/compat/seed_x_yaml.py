"""SEED-X from the original YAML files: each describes a part by the original `_target_` and keys.

    files = {"tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml", …}
    SeedX.from_pretrained(config_of_files(files, tuned=True))

`TARGETS` maps each name to a function of this module that loads nothing and returns path and sizes
of the weights; `targets.ALIASES` maps it to the object itself. Sizes stored with the weights
(`config.json`, `resampler.json`) override the YAML's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from seed_multimodal.config import instantiate
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed_x.adapter import RESAMPLER_CONFIG, ResamplerXLConfig
from seed_multimodal.models.seed_x.modeling import AgentSettings
from seed_multimodal.models.seed_x.pipeline import AgentConfig
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.nn.vision.qwen import QwenVitConfig, ResamplerConfig
from seed_multimodal.settings import read_settings
from seed_multimodal.weights.catalogue import catalogue
from seed_multimodal.weights.find import locate, locate_or_same

# Kind of file → part of `SeedXConfig`.
KEYS = {
    "tokenizer": "tokenizer",
    "llm": "llm",
    "visual_encoder": "vision",
    "agent": "agent",
    "adapter": "detokenizer",
    "discrete_model": "discrete_model",
}
SDXL = catalogue().parts["sdxl"].folder
_MODULE = "seed_multimodal.compat.seed_x_yaml"
_LANGUAGE = "seed_multimodal.language"
_VISUAL = "src.models.tokenizer.qwen_visual"
_DISCRETE = "src.models.tokenizer.discrete_models"
_MLLM = "src.models.mllm"
_PEFT = "src.models.mllm.peft_models"
_RESAMPLER = "src.models.detokenizer.resampler"
_ADAPTER = "src.models.detokenizer.adapter_modules"
# The originals' names → the function, or dataclass of sizes, that describes such a part.
TARGETS = {
    "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "transformers.LlamaTokenizer.from_pretrained": f"{_MODULE}:tokenizer",
    f"{_LANGUAGE}.llama_tokenizer.LlamaTokenizer.from_pretrained": f"{_MODULE}:tokenizer",
    f"{_VISUAL}.VisionTransformerWithAttnPool.from_pretrained": f"{_MODULE}:vision_encoder",
    f"{_VISUAL}.Resampler": "seed_multimodal.nn.vision.qwen:ResamplerConfig",
    f"{_DISCRETE}.DiscreteModleIdentity": f"{_MODULE}:no_discrete_model",
    f"{_MLLM}.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": f"{_MODULE}:language_model",
    f"{_PEFT}.get_peft_model_with_resize_embedding": f"{_MODULE}:language_model_with_lora",
    f"{_PEFT}.get_full_model_with_resize_embedding": f"{_MODULE}:full_language_model",
    f"{_PEFT}.get_model_with_resize_embedding": f"{_MODULE}:full_language_model",
    "peft.LoraConfig": f"{_MODULE}:lora",
    f"{_MLLM}.seed_x.ContinuousLVLM.from_pretrained": f"{_MODULE}:agent",
    f"{_RESAMPLER}.ResamplerXLV2": "seed_multimodal.models.seed_x.adapter:ResamplerXLConfig",
    f"{_ADAPTER}.SDXLAdapter.from_pretrained": f"{_MODULE}:adapter",
    f"{_ADAPTER}.SDXLAdapterWithLatentImage.from_pretrained": f"{_MODULE}:adapter",
}
# A key of the original vision encoder's file, which has a quotation mark too many.
STRAY_KEY = "image_start_id"
PATH = "pretrained_model_path"  # key of a part's weights
RESAMPLERS = ("input_resampler", "output_resampler")
Sizes = QwenVitConfig | AgentConfig | ResamplerXLConfig


@dataclass(frozen=True)
class Described:
    """A part that a YAML file describes."""

    key: str  # of `SeedXConfig`
    path: Path = Path()
    sizes: Any = None  # `Sizes`; None: those next to the weights
    lora: Mapping[str, object] | None = None  # fields of its LoRA


def tokenizer(pretrained_model_name_or_path: str) -> Described:
    """`LlamaTokenizer.from_pretrained`."""
    return Described("tokenizer", Path(pretrained_model_name_or_path))


def language_model(pretrained_model_name_or_path: str, low_cpu_mem_usage: bool = True) -> Described:
    """`LlamaForCausalLM.from_pretrained`."""
    return Described("llm", Path(pretrained_model_name_or_path))


def lora(**values: object) -> dict[str, object]:
    """`peft.LoraConfig`; `r` and `lora_alpha` are needed to merge a trained LoRA into its base."""
    return values


def language_model_with_lora(
    model: Described,
    peft_config: Mapping[str, object],
    vocab_size: int | None = None,
    torch_dtype: str = "bf16",
) -> Described:
    """`get_peft_model_with_resize_embedding`; the last two had their effect in training."""
    return Described("llm", model.path, lora=peft_config)


def full_language_model(
    model: Described, vocab_size: int | None = None, torch_dtype: str = "bf16"
) -> Described:
    """`get_full_model_with_resize_embedding`, `get_model_with_resize_embedding`.

    The last two arguments had their effect in training.
    """
    return model


def vision_encoder(pretrained_model_path: str, **sizes: object) -> Described:
    """`VisionTransformerWithAttnPool.from_pretrained`."""
    config = read_settings(QwenVitConfig, without_stray_key(sizes), "vision encoder")
    return _sized("vision", pretrained_model_path, config)


def agent(
    input_resampler: ResamplerConfig,
    output_resampler: ResamplerConfig,
    pretrained_model_path: str,
    **settings: object,
) -> Described:
    """`ContinuousLVLM.from_pretrained`."""
    losses = read_settings(AgentSettings, settings, "agent")
    config = AgentConfig(input_resampler, output_resampler, losses)
    return _sized("agent", pretrained_model_path, config)


def adapter(
    resampler: ResamplerXLConfig,
    pretrained_model_path: str,
    vit_down: bool = True,
    full_ft: bool = False,
    set_trainable_late: bool = False,
) -> Described:
    """`SDXLAdapter.from_pretrained` of either stage, which follows from the weights.

    The last two arguments had their effect in training.
    """
    return _sized("detokenizer", pretrained_model_path, resampler, RESAMPLER_CONFIG)


def no_discrete_model() -> Described:
    """`DiscreteModleIdentity`: features are drawn as they are."""
    return Described("discrete_model")


def targets_of(function: Callable[..., Described]) -> tuple[str, ...]:
    """The originals' names of the parts that a function of this module describes."""
    target = f"{_MODULE}:{function.__name__}"
    return tuple(name for name, described_by in TARGETS.items() if described_by == target)


def without_stray_key(values: Mapping[str, object]) -> dict[str, Any]:
    """The keys of a vision encoder's file."""
    return {key: value for key, value in values.items() if not key.startswith(STRAY_KEY)}


def split_agent(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The losses' settings of an agent's file, and its other keys.

    The originals' files have those settings at the top; ours, which win, have them below `losses`.
    Hydra's keys in the resamplers, which begin with an underscore, are left out.
    """
    others = dict(values)
    losses: dict[str, Any] = {}
    for field in fields(AgentSettings):
        if field.name in others:
            losses[field.name] = others.pop(field.name)
    losses |= others.pop("losses", None) or {}
    for name in RESAMPLERS:
        if isinstance(others.get(name), Mapping):
            resampler = others[name].items()
            others[name] = {key: value for key, value in resampler if not key.startswith("_")}
    return losses, others


def config_of_files(
    files: Mapping[str, str | Path],
    *,
    tuned: bool = True,
    sdxl: str | Path = SDXL,
) -> SeedXConfig:
    """The system that YAML files describe.

    files: path by kind, a key of `KEYS` or `image_transform`.
    tuned: whether the language model follows instructions.
    sdxl: SDXL's diffusers folder, for the adapter.

    Raises:
        CheckpointError: missing parts, with instructions.
        ConfigError: a missing file, or one that describes another part.
    """
    # 1. The parts of the system; images are drawn from features, without a discrete model.
    parts: dict[str, Described] = {}
    for kind, file in files.items():
        if kind != "image_transform":
            part = _read(file, kind)
            parts[part.key] = part
    parts.pop("discrete_model", None)
    paths: dict[str, Any] = {key: part.path for key, part in parts.items()}
    if "detokenizer" in parts:
        paths["sdxl"] = Path(sdxl)

    # 2. The system, without the other parts.
    config = SeedXConfig.find("seed-x-i", tuned=tuned, **paths)
    sizes: dict[str, Any] = {
        key: part.sizes for key, part in parts.items() if part.sizes is not None
    }
    if "llm" in parts and parts["llm"].lora is not None:
        sizes["lora"] = parts["llm"].lora
    config.found = replace(config.found, name="SEED-X", sizes=sizes)
    for key in SeedXConfig.parts().keys() - paths.keys():
        setattr(config, key, None)

    # 3. Images are squashed.
    if "image_transform" in files and _build(files["image_transform"]).keep_ratio:
        raise ConfigError(
            f"{files['image_transform']}: SEED-X reads squares: set keep_ratio to False."
        )
    return config.require(*paths)


def _build(file: str | Path) -> Any:
    """The part described by a YAML file, in the current folder or below the repository root."""
    try:
        return instantiate(locate_or_same(file), TARGETS)
    except ConfigError as error:
        if Path(file).name in str(error):
            raise
        raise ConfigError(f"{file}: {error}") from error


def _read(file: str | Path, kind: str) -> Described:
    part = _build(file)
    if not isinstance(part, Described) or part.key != KEYS[kind]:
        raise ConfigError(f"{file}: describes another part than the {kind.replace('_', ' ')}.")
    return part


def _sized(key: str, path: str, sizes: Sizes | None, config_name: str = "config.json") -> Described:
    """A part; sizes stored with its weights, in `config_name`, override those of the YAML."""
    weights = locate(path)
    if weights is not None:
        folder = weights if weights.is_dir() else weights.parent
        if (folder / config_name).is_file():
            sizes = None
    return Described(key, Path(path), sizes)
