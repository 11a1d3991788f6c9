"""Settings of the nano speed run: sizes of every part and length of every stage, from one YAML file.

Unknown keys are errors that name the nearest key. The files in `configs/nano/` open with the command that runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from seed_multimodal.config import read_yaml
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.training.loop_settings import StageSettings


@dataclass
class VaeSizes:
    """AutoencoderKL: 64 px → 8×8 latents of `latent_channels`."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    layers: int = 1
    latent_channels: int = 8
    groups: int = 8


@dataclass
class ClipSizes:
    """The CLIP pair: vision tower (transformers' `CLIPVisionModelWithProjection`) and text tower."""

    width: int = 192
    layers: int = 6
    heads: int = 6
    patch: int = 16
    embedding: int = 256
    text_width: int = 160
    text_layers: int = 2


@dataclass
class TokenizerSizes:
    """SEED-2 tokenizer: EVA ViT, causal Q-Former, codebook, decode blocks."""

    vit_width: int = 192
    vit_layers: int = 4
    vit_heads: int = 6
    patch: int = 16
    hidden: int = 192
    layers: int = 3
    heads: int = 6
    decode_depth: int = 2
    codes: int = 1024
    code_dim: int = 16
    sections: bool = True


@dataclass
class UnetSizes:
    """Latent U-Net (`UNet2DConditionModel`), v-prediction."""

    channels: list[int] = field(default_factory=lambda: [80, 128])
    layers: int = 1
    heads: int = 4
    cross_dim: int = 96


@dataclass
class LlmSizes:
    """LLaMA, and whether its layers are compiled in training (faster; needs a C++ compiler)."""

    width: int = 256
    layers: int = 4
    heads: int = 8
    ffn: int = 640
    text_vocabulary: int = 2000
    positions: int = 512
    compile: bool = False


def _stage(steps: int, batch: int, lr: float, **more: Any) -> Any:
    return field(default_factory=lambda: StageSettings(steps=steps, batch_size=batch, lr=lr, **more))


@dataclass
class NanoConfig:
    """Everything one run needs; the resolved file is saved beside its outputs.

    `views` of each picture are kept with their latents and embeddings; the language model reads `code_views` of it.
    """

    image_size: int = setting(64, least=1)
    views: int = setting(8, least=1)
    code_views: int = setting(8, least=1)
    limit: int = setting(0, least=0)
    device: str = "auto"
    seed: int = 0
    vae: VaeSizes = field(default_factory=VaeSizes)
    clip: ClipSizes = field(default_factory=ClipSizes)
    tokenizer: TokenizerSizes = field(default_factory=TokenizerSizes)
    unet: UnetSizes = field(default_factory=UnetSizes)
    llm: LlmSizes = field(default_factory=LlmSizes)
    train_vae: StageSettings = _stage(1500, 32, 2e-3, ema=0.995)
    train_vae2: StageSettings = _stage(1500, 32, 1e-3, ema=0.995)
    train_clip: StageSettings = _stage(3000, 128, 1e-3)
    train_stage1: StageSettings = _stage(2000, 128, 1e-3)
    train_stage2: StageSettings = _stage(2000, 128, 1e-3)
    train_unet: StageSettings = _stage(6000, 96, 1e-3, ema=0.999)
    train_unet2: StageSettings = _stage(3000, 96, 5e-4, ema=0.999)
    train_pretrain: StageSettings = _stage(4000, 64, 2e-3)
    train_sft: StageSettings = _stage(2000, 64, 1e-3)
    judge_steps: int = setting(2000, least=1)
    gate_r2: float = 0.85


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> NanoConfig:
    """Read YAML over the defaults, then dotted overrides such as `train_vae.steps=100`.

    Raises:
        ConfigError: missing file, unknown key (the nearest one is named) or a value of the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such settings file.")
    given = read_yaml(file)
    try:
        merged = OmegaConf.merge(asdict(NanoConfig()), given, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{file}: {first_line(error)}.") from error
    assert isinstance(merged, DictConfig)
    return read_settings(NanoConfig, merged, str(file))


def save_config(config: NanoConfig, path: str | Path) -> None:
    """Write the resolved settings as YAML."""
    OmegaConf.save(OmegaConf.create(asdict(config)), Path(path))
