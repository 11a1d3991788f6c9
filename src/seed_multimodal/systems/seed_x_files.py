"""SEED-X from the released YAML files: each describes one part by the original's `_target_` and keys.

    spec = spec_of_files({"tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml", …}, tuned=True)
    SeedX.from_pretrained(spec)

`config.ALIASES` leads each name to a function here, which loads nothing: it says where the weights are and which sizes
they have. Sizes that stand beside the weights (`config.json`, `resampler.json`) win over the YAML's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from seed_multimodal.config import instantiate
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import PARTS, locate
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.seed_x.adapter import SIZES, ResamplerSizes
from seed_multimodal.seed_x.modeling import AgentSettings
from seed_multimodal.seed_x.vision import QwenVitConfig, ResamplerConfig
from seed_multimodal.settings import check_keys, read_settings
from seed_multimodal.system.config import PARTS as SYSTEM_PARTS
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.seed_x_parts import AgentSizes

T = TypeVar("T")
SDXL = PARTS["sdxl"].folder
STRAY = "image_start_id"  # a key of the released tower's file, there with a quotation mark too many


@dataclass(frozen=True)
class Words:
    """The tokenizer's folder."""

    path: Path


@dataclass(frozen=True)
class LanguageModel:
    """The language model's folder; `lora`: fields of the LoRA on it, whose weights are in the agent's file."""

    path: Path
    lora: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tower:
    """The vision tower's file and sizes; None: those beside the weights."""

    path: Path
    sizes: QwenVitConfig | None


@dataclass(frozen=True)
class AgentFile:
    """The agent's file or folder and sizes; None: those beside the weights."""

    path: Path
    sizes: AgentSizes | None


@dataclass(frozen=True)
class Adapter:
    """The de-tokenizer's file and its resampler's sizes; None: those beside the weights."""

    path: Path
    sizes: ResamplerSizes | None


@dataclass(frozen=True)
class Unchanged:
    """No discrete codes: features are drawn as they are (`DiscreteModleIdentity`)."""


@dataclass(frozen=True)
class LoraFields:
    """Fields of `peft.LoraConfig`."""

    values: Mapping[str, Any]


def words(pretrained_model_name_or_path: str) -> Words:
    """`LlamaTokenizer.from_pretrained`."""
    return Words(_path(pretrained_model_name_or_path))


def language_model(pretrained_model_name_or_path: str, low_cpu_mem_usage: bool = True) -> LanguageModel:
    """`LlamaForCausalLM.from_pretrained`; memory is always spared."""
    return LanguageModel(_path(pretrained_model_name_or_path))


def lora(**values: Any) -> LoraFields:
    """`peft.LoraConfig`, of which `r` and `lora_alpha` are needed to put a trained LoRA into its base."""
    return LoraFields(values)


def language_model_with_lora(model: LanguageModel, peft_config: LoraFields, vocab_size: int | None = None,
                             torch_dtype: str = "bf16") -> LanguageModel:
    """`get_peft_model_with_resize_embedding`, to read what was tuned so; the last two had their effect in training."""
    if not isinstance(model, LanguageModel) or not isinstance(peft_config, LoraFields):
        raise ConfigError("model must describe a language model, and peft_config a peft.LoraConfig.")
    return LanguageModel(model.path, peft_config.values)


def tower(pretrained_model_path: str, **sizes: Any) -> Tower:
    """`VisionTransformerWithAttnPool.from_pretrained`; raises `ConfigError` for an unknown size."""
    given = {key: value for key, value in sizes.items() if not key.startswith(STRAY)}
    check_keys(given, [one.name for one in fields(QwenVitConfig)], "vision tower")
    path = _path(pretrained_model_path)
    return Tower(path, None if _is_beside(path, "config.json") else read_settings(QwenVitConfig, given, "vision tower"))


def agent(input_resampler: ResamplerConfig, output_resampler: ResamplerConfig, pretrained_model_path: str,
          **settings: Any) -> AgentFile:
    """`ContinuousLVLM.from_pretrained`; raises `ConfigError` for an unknown setting."""
    if not isinstance(input_resampler, ResamplerConfig) or not isinstance(output_resampler, ResamplerConfig):
        raise ConfigError("input_resampler and output_resampler must each describe a Resampler.")
    path = _path(pretrained_model_path)
    made = AgentSizes(input_resampler, output_resampler, read_settings(AgentSettings, settings, "agent"))
    return AgentFile(path, None if _is_beside(path, "config.json") else made)


def adapter(resampler: ResamplerSizes, pretrained_model_path: str, vit_down: bool = True, full_ft: bool = False,
            set_trainable_late: bool = False) -> Adapter:
    """`SDXLAdapter.from_pretrained` of either stage, which the file itself tells; the last two are of training."""
    if not isinstance(resampler, ResamplerSizes):
        raise ConfigError("resampler must describe a ResamplerXLV2.")
    path = _path(pretrained_model_path)
    return Adapter(path, None if _is_beside(path, SIZES) else resampler)


def spec_of_files(files: Mapping[str, str | Path], *, tuned: bool = True, sdxl: str | Path = SDXL) -> SystemConfig:
    """The parts that YAML files describe, checked to be there.

    Args:
        files: of `tokenizer`, `visual_encoder`, `llm`, `agent`, `adapter`, `image_transform`, `discrete_model` those
            that are needed. What is not named is not looked for.
        sdxl: SDXL's diffusers folder, looked for with `adapter`.

    Raises:
        CheckpointError: parts that are not there: all of them, and what to put where. ConfigError: a file that is not
            there, describes something else, or sizes that do not fit each other.
    """
    found: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    lora = None
    if "tokenizer" in files:
        found["tokenizer"] = _read(files["tokenizer"], Words).path
    if "llm" in files:
        model = _read(files["llm"], LanguageModel)
        found["llm"], lora = model.path, model.lora
    if "visual_encoder" in files:
        seen = _read(files["visual_encoder"], Tower)
        found["vision"], sizes["vision"] = seen.path, seen.sizes
    if "agent" in files:
        resamplers = _read(files["agent"], AgentFile)
        found["agent"], sizes["agent"] = resamplers.path, resamplers.sizes
    if "adapter" in files:
        drawing = _read(files["adapter"], Adapter)
        found |= {"detokenizer": drawing.path, "sdxl": Path(sdxl)}
        sizes["detokenizer"] = drawing.sizes
    if "discrete_model" in files:
        _read(files["discrete_model"], Unchanged)
    spec = SystemConfig.find("seed-x-i", **found, tuned=tuned)
    spec.name, spec.sizes, spec.lora = "SEED-X", sizes, lora
    for key in SYSTEM_PARTS["seed_x"].keys() - found.keys():
        setattr(spec, key, None)
    if "image_transform" in files:
        _check_transform(_read(files["image_transform"], ImageTransform), spec, files["image_transform"])
    return spec.require(*found)


def shown_file(file: str | Path) -> Path:
    """A YAML file here, or below the repository root."""
    return locate(file) or Path(file)


def _read(file: str | Path, kind: type[T]) -> T:
    try:
        made = instantiate(shown_file(file))
    except ConfigError as error:
        raise error if Path(file).name in str(error) else ConfigError(f"{file}: {error}") from error
    if not isinstance(made, kind):
        raise ConfigError(f"{file}: describes a {type(made).__name__}, not a {kind.__name__}.")
    return made


def _check_transform(transform: ImageTransform, spec: SystemConfig, file: str | Path) -> None:
    """Views are made as the released transform makes them; another one cannot be asked for."""
    if transform.keep_ratio:
        raise ConfigError(f"{file}: keep_ratio: the views of a picture are squares already; set it to False.")
    sizes = spec.sizes.get("vision")
    if sizes is not None and transform.image_size != sizes.image_size:
        raise ConfigError(f"{file}: image_size {transform.image_size}, but the vision encoder takes "
                          f"{sizes.image_size}.")


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"A path is needed, not {value!r}.")
    return Path(value)


def _is_beside(path: Path, name: str) -> bool:
    """Whether the weights' own sizes are beside them."""
    place = locate(path)
    return place is not None and ((place if place.is_dir() else place.parent) / name).is_file()
