"""SEED-X from the original YAML files: each describes one part by the original's `_target_` and keys.

    config = config_of_files({"tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml", …}, tuned=True)
    SeedX.from_pretrained(config)

`TARGETS` maps each name to a function here that loads nothing and returns path and sizes of the weights;
`config.ALIASES` maps it to the object itself. Sizes stored with the weights (`config.json`, `resampler.json`) override
the YAML's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.config import instantiate_by
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import ORIGINAL_PARTS, locate
from seed_multimodal.seed_x.adapter import RESAMPLER_CONFIG, ResamplerXLConfig
from seed_multimodal.seed_x.modeling import AgentSettings
from seed_multimodal.seed_x.pipeline import AgentConfig
from seed_multimodal.seed_x.vision import QwenVitConfig, ResamplerConfig
from seed_multimodal.settings import read_settings
from seed_multimodal.system.config import PARTS as SYSTEM_PARTS
from seed_multimodal.system.config import SystemConfig

KEYS = {
    "tokenizer": "tokenizer",
    "llm": "llm",
    "visual_encoder": "vision",
    "agent": "agent",
    "adapter": "detokenizer",
    "discrete_model": "discrete_model",
}  # kind of file → part of `SystemConfig`
_HERE = "seed_multimodal.seed_x.original"
TARGETS = {  # the originals' names → what describes such a part
    "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "transformers.LlamaTokenizer.from_pretrained": f"{_HERE}:words",
    "seed_multimodal.language.llama_tokenizer.LlamaTokenizer.from_pretrained": f"{_HERE}:words",
    "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained": f"{_HERE}:vision_encoder",
    "src.models.tokenizer.qwen_visual.Resampler": "seed_multimodal.seed_x.vision:ResamplerConfig",
    "src.models.tokenizer.discrete_models.DiscreteModleIdentity": f"{_HERE}:no_discrete_model",
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": f"{_HERE}:language_model",
    "src.models.mllm.peft_models.get_peft_model_with_resize_embedding": f"{_HERE}:language_model_with_lora",
    "src.models.mllm.peft_models.get_full_model_with_resize_embedding": f"{_HERE}:full_language_model",
    "src.models.mllm.peft_models.get_model_with_resize_embedding": f"{_HERE}:full_language_model",
    "peft.LoraConfig": f"{_HERE}:lora",
    "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained": f"{_HERE}:agent",
    "src.models.detokenizer.resampler.ResamplerXLV2": "seed_multimodal.seed_x.adapter:ResamplerXLConfig",
    "src.models.detokenizer.adapter_modules.SDXLAdapter.from_pretrained": f"{_HERE}:adapter",
    "src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage.from_pretrained": f"{_HERE}:adapter",
}
STRAY = "image_start_id"  # a key of the original vision encoder's file, there with a quotation mark too many


@dataclass(frozen=True)
class Described:
    """A part: key of `SystemConfig`, path, sizes (None: those next to the weights), fields of its LoRA."""

    key: str
    path: Path = Path()
    sizes: Any = None
    lora: Mapping[str, Any] | None = None


def words(pretrained_model_name_or_path: str) -> Described:
    """`LlamaTokenizer.from_pretrained`."""
    return Described("tokenizer", Path(pretrained_model_name_or_path))


def language_model(pretrained_model_name_or_path: str, low_cpu_mem_usage: bool = True) -> Described:
    """`LlamaForCausalLM.from_pretrained`."""
    return Described("llm", Path(pretrained_model_name_or_path))


def lora(**values: Any) -> dict[str, Any]:
    """`peft.LoraConfig`, of which `r` and `lora_alpha` are needed to put a trained LoRA into its base."""
    return values


def language_model_with_lora(
    model: Described,
    peft_config: Mapping[str, Any],
    vocab_size: int | None = None,
    torch_dtype: str = "bf16",
) -> Described:
    """`get_peft_model_with_resize_embedding`; the last two had their effect in training."""
    return Described("llm", model.path, lora=peft_config)


def full_language_model(
    model: Described, vocab_size: int | None = None, torch_dtype: str = "bf16"
) -> Described:
    """`get_full_model_with_resize_embedding`, `get_model_with_resize_embedding`; the last two are of training."""
    return model


def vision_encoder(pretrained_model_path: str, **sizes: Any) -> Described:
    """`VisionTransformerWithAttnPool.from_pretrained`."""
    known = {key: value for key, value in sizes.items() if not key.startswith(STRAY)}
    return _sized(
        "vision", pretrained_model_path, read_settings(QwenVitConfig, known, "vision encoder")
    )


def agent(
    input_resampler: ResamplerConfig,
    output_resampler: ResamplerConfig,
    pretrained_model_path: str,
    **settings: Any,
) -> Described:
    """`ContinuousLVLM.from_pretrained`."""
    losses = read_settings(AgentSettings, settings, "agent")
    return _sized(
        "agent", pretrained_model_path, AgentConfig(input_resampler, output_resampler, losses)
    )


def adapter(
    resampler: ResamplerXLConfig,
    pretrained_model_path: str,
    vit_down: bool = True,
    full_ft: bool = False,
    set_trainable_late: bool = False,
) -> Described:
    """`SDXLAdapter.from_pretrained` of either stage, which the weights tell; the last two are of training."""
    return _sized("detokenizer", pretrained_model_path, resampler, RESAMPLER_CONFIG)


def no_discrete_model() -> Described:
    """`DiscreteModleIdentity`: features are drawn as they are."""
    return Described("discrete_model")


def config_of_files(
    files: Mapping[str, str | Path],
    *,
    tuned: bool = True,
    sdxl: str | Path = ORIGINAL_PARTS["sdxl"].folder,
) -> SystemConfig:
    """The parts that YAML files (of `KEYS` and `image_transform`) describe; `adapter` needs `sdxl`'s diffusers folder.

    Raises:
        CheckpointError: missing parts, with instructions. ConfigError: a missing file, or one that describes something
            else.
    """
    parts = {kind: _read(file, kind) for kind, file in files.items() if kind != "image_transform"}
    places: dict[str, Any] = {
        part.key: part.path for part in parts.values() if part.key != "discrete_model"
    }
    if "detokenizer" in places:
        places["sdxl"] = Path(sdxl)
    config = SystemConfig.find("seed-x-i", **places, tuned=tuned)
    config.name, config.lora = "SEED-X", parts["llm"].lora if "llm" in parts else None
    config.sizes = {part.key: part.sizes for part in parts.values() if part.sizes is not None}
    for key in SYSTEM_PARTS["seed_x"].keys() - places.keys():
        setattr(config, key, None)
    if "image_transform" in files and _build(files["image_transform"]).keep_ratio:
        raise ConfigError(
            f"{files['image_transform']}: SEED-X reads squares: set keep_ratio to False."
        )
    return config.require(*places)


def _build(file: str | Path) -> Any:
    """The part described by a YAML file, in the current folder or below the repository root."""
    try:
        return instantiate_by(TARGETS, locate(file) or Path(file))
    except ConfigError as error:
        raise error if Path(file).name in str(error) else ConfigError(f"{file}: {error}") from error


def _read(file: str | Path, kind: str) -> Described:
    part = _build(file)
    if not isinstance(part, Described) or part.key != KEYS[kind]:
        raise ConfigError(f"{file}: describes another part than the {kind.replace('_', ' ')}.")
    return part


def _sized(key: str, path: str, sizes: Any, config: str = "config.json") -> Described:
    """A part; sizes stored with its weights override those of the YAML."""
    place = locate(path)
    known = place is not None and ((place if place.is_dir() else place.parent) / config).is_file()
    return Described(key, Path(path), None if known else sizes)
