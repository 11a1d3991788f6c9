"""Settings of the nano speed run: sizes of every part and length of every stage, from one YAML file.

Unknown keys are errors that name the nearest key. The files in `configs/nano/` open with the command that runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from seed_multimodal.config import read_yaml
from seed_multimodal.disk import replace_text
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.training.loop_settings import StageSettings, stage


@dataclass
class VaeSizes:
    """AutoencoderKL: 64 px → 16×16 latents of `latent_channels`."""

    channels: list[int] = setting(factory=lambda: [24, 48, 96], least=1)
    layers: int = setting(1, least=1)
    latent_channels: int = setting(4, least=1)
    groups: int = setting(8, least=1)


@dataclass
class ClipSizes:
    """The vision tower, transformers' `CLIPVisionModelWithProjection`."""

    width: int = setting(192, least=1)
    layers: int = setting(6, least=1)
    heads: int = setting(6, least=1)
    patch: int = setting(16, least=1)
    embedding: int = setting(256, least=1)


@dataclass
class TokenizerSizes:
    """SEED-2 tokenizer: causal Q-Former, codebook, decode blocks; its vision tower is that of stage `clip`."""

    hidden: int = setting(128, least=1)
    layers: int = setting(3, least=1)
    heads: int = setting(4, least=1)
    decode_depth: int = setting(2, least=1)
    codes: int = setting(1024, least=1)
    code_dim: int = setting(3, least=1)
    sections: bool = True


@dataclass
class UnetSizes:
    """Latent U-Net (`UNet2DConditionModel`), v-prediction."""

    channels: list[int] = setting(factory=lambda: [48, 96, 96], least=1)
    layers: int = setting(1, least=1)
    heads: int = setting(4, least=1)
    cross_dim: int = setting(96, least=1)


@dataclass
class LlmSizes:
    """LLaMA. compile: its layers are compiled in training (a quarter faster); None: where a C++ compiler is found."""

    width: int = setting(256, least=1)
    layers: int = setting(4, least=1)
    heads: int = setting(8, least=1)
    ffn: int = setting(640, least=1)
    text_vocabulary: int = setting(1500, least=1)
    positions: int = setting(512, least=1)
    compile: bool | None = None


@dataclass
class RecordCounts:
    """How many records of each kind (see `world.records`) the language model is trained on. Kinds about a single
    picture take it from the pool."""

    captions: int = setting(60_000, least=1)
    describe: int = setting(30_000, least=1)
    questions: int = setting(60_000, least=1)
    draw: int = setting(30_000, least=1)
    edits: int = setting(45_000, least=1)
    conversations: int = setting(24_000, least=1)
    in_context: int = setting(8_000, least=1)
    stories: int = setting(5_000, least=1)
    documents: int = setting(2_500, least=1)
    continued: int = setting(2_500, least=1)
    talk: int = setting(3_000, least=1)
    asides: int = setting(3_000, least=1)


@dataclass
class NanoConfig:
    """Everything one run needs; the resolved file is saved beside its outputs.

    Latents, embeddings and codes of the first `pool` training scenes are kept; gates are measured on `gate_scenes` of
    a held-out split. `workers` processes draw scenes ahead (0: the process that trains).
    """

    image_size: int = setting(64, least=32)
    pool: int = setting(60_000, least=8)
    gate_scenes: int = setting(1000, least=1)
    workers: int = setting(0, least=0)
    device: str = "auto"
    seed: int = 0
    vae: VaeSizes = field(default_factory=VaeSizes)
    clip: ClipSizes = field(default_factory=ClipSizes)
    tokenizer: TokenizerSizes = field(default_factory=TokenizerSizes)
    unet: UnetSizes = field(default_factory=UnetSizes)
    llm: LlmSizes = field(default_factory=LlmSizes)
    records: RecordCounts = field(default_factory=RecordCounts)
    train_vae: StageSettings = stage(4000, 32, 2e-3, ema=0.995)
    train_clip: StageSettings = stage(3500, 128, 1e-3, ema=0.99)
    train_stage1: StageSettings = stage(1500, 128, 1e-3)
    train_stage2: StageSettings = stage(4000, 128, 1e-3)
    train_unet: StageSettings = stage(5000, 96, 1e-3, ema=0.999)
    train_unet2: StageSettings = stage(3000, 96, 5e-4, ema=0.999)
    train_pretrain: StageSettings = stage(2500, 64, 2e-3, weight_decay=0.1)
    train_sft: StageSettings = stage(5000, 64, 2e-3, weight_decay=0.1)
    judge_steps: int = setting(1500, least=1)
    gate_psnr: float = 22.0
    gate_named: float = 0.95

    def __post_init__(self) -> None:
        """Sizes that do not fit each other are refused now, not when their stage begins.

        Raises:
            ConfigError: a size is no multiple of what divides it.
        """
        vae, unet, clip, tokenizer, llm = self.vae, self.unet, self.clip, self.tokenizer, self.llm
        sections = Seed2Config.num_query if tokenizer.sections else 1
        for name, value, unit, why in (
                ("image_size", self.image_size, 16, "side of the picture that is read out of an embedding"),
                ("image_size", self.image_size, clip.patch, "clip.patch"),
                ("image_size", self.image_size, 2 ** max(0, len(vae.channels) + len(unet.channels) - 2),
                 "halvings of vae.channels and unet.channels"),
                *(("vae.channels", width, vae.groups, "vae.groups") for width in vae.channels or [0]),
                *(("unet.channels", width, 8, "groups of the U-Net") for width in unet.channels or [0]),
                ("clip.width", clip.width, clip.heads, "clip.heads"),
                ("tokenizer.hidden", tokenizer.hidden, tokenizer.heads, "tokenizer.heads"),
                ("tokenizer.codes", tokenizer.codes, sections, "sections of the codebook"),
                ("llm.width", llm.width, 2 * llm.heads, "pairs of numbers in each of llm.heads")):
            if value < 1 or value % unit:
                raise ConfigError(f"{name} must be a multiple of {unit} ({why}), not {value}.")


Settings = TypeVar("Settings")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> NanoConfig:
    """nano's settings, see `load_settings`."""
    return load_settings(NanoConfig, path, overrides)


def load_settings(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read YAML over the defaults of a dataclass, then dotted overrides such as `train_vae.steps=100`.

    Raises:
        ConfigError: missing file, unknown key (the nearest one is named) or a value of the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such settings file.")
    given = read_yaml(file)
    try:
        merged = OmegaConf.merge(asdict(kind()), given,  # type: ignore[call-overload]
                                OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{file}: {first_line(error)}.") from error
    assert isinstance(merged, DictConfig)
    return read_settings(kind, merged, str(file))


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved settings as YAML."""
    replace_text(Path(path), OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
