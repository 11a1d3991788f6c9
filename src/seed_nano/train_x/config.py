"""Settings of nano-x: sizes of every part and length of every stage, from one YAML file (configs/nano_x/)."""

from __future__ import annotations

from dataclasses import dataclass, field

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.training.loop_settings import StageSettings, stage

KINDS = {"describe": 0.12, "questions": 0.24, "draw": 0.11, "edits": 0.17, "conversations": 0.05, "talk": 0.01,
         "asides": 0.01, "detect": 0.19, "wide_describe": 0.03, "wide_questions": 0.03, "wide_detect": 0.04}
"""Shares of the sequences of instruction tuning: kind of `seed_nano.world.x_records` -> share."""


@dataclass
class TowerSizes:
    """The Qwen-style tower: `grid`² features of `features` numbers; its width, heads and patch are those of nano's own
    tower, of whose layers the first `layers` are its start."""

    layers: int = setting(4, least=1)
    grid: int = setting(4, least=1)
    features: int = setting(24, least=4)
    pool_heads: int = setting(3, least=1)


@dataclass
class LayoutSizes:
    """`detokenizers.layout.LayoutDecoder`."""

    width: int = setting(192, least=1)
    features: int = setting(32, least=1)
    side: int = setting(8, least=1)
    hidden: int = setting(64, least=8)
    depth: int = setting(2, least=1)
    coarse: int = setting(8, least=1)


@dataclass
class UnetSizes:
    """The SDXL-class U-Net and the resampler in front of it (`ResamplerXLV2`)."""

    channels: list[int] = setting(factory=lambda: [32, 48, 64], least=1)
    heads: int = setting(2, least=1)
    queries: int = setting(16, least=1)
    dim: int = setting(48, least=1)
    depth: int = setting(1, least=0)
    prompt: int = setting(32, least=2)


@dataclass
class LanguageSizes:
    """LLaMA with its words, `text_vocabulary` pieces among them."""

    width: int = setting(192, least=1)
    layers: int = setting(4, least=1)
    heads: int = setting(6, least=1)
    ffn: int = setting(448, least=1)
    text_vocabulary: int = setting(800, least=1)
    positions: int = setting(512, least=1)
    compile: bool | None = None


@dataclass
class AgentSizes(LanguageSizes):
    """With `locations` places of boxes along each side."""

    locations: int = setting(64, least=1)


def check_multiples(*sizes: tuple[str, int, int, str]) -> None:
    """Refuse sizes that do not fit each other.

    Args:
        sizes: (name, value, what it must be a multiple of, why).

    Raises:
        ConfigError: one is none.
    """
    for name, value, unit, why in sizes:
        if value < 1 or value % unit:
            raise ConfigError(f"{name} must be a multiple of {unit} ({why}), not {value}.")


@dataclass
class NanoXConfig:
    """Everything one run needs; the resolved file is saved beside its outputs.

    Attributes:
        start: a finished nano: its autoencoder is taken over, and its vision tower is where the tower's training
            starts.
        pool: edits of which latents and features are kept (two pictures each).
        gate_scenes, workers, device: as of nano's settings.
        records: records of an epoch of each kind.
        gate_named: least share of a label of val scenes that features must name right.
    """

    start: str = "pretrained/nano"
    image_size: int = setting(64, least=32)
    pool: int = setting(24_000, least=8)
    gate_scenes: int = setting(1000, least=1)
    workers: int = setting(0, least=0)
    device: str = "auto"
    seed: int = 0
    tower: TowerSizes = field(default_factory=TowerSizes)
    layout: LayoutSizes = field(default_factory=LayoutSizes)
    unet: UnetSizes = field(default_factory=UnetSizes)
    llm: AgentSizes = field(default_factory=AgentSizes)
    records: int = setting(400_000, least=1)
    train_tower: StageSettings = stage(3000, 128, 8e-4, ema=0.99)
    train_layout: StageSettings = stage(2500, 96, 2e-3, ema=0.998)
    train_first: StageSettings = stage(1500, 48, 1e-3, ema=0.995)
    train_second: StageSettings = stage(1500, 48, 1e-3, ema=0.995)
    train_sft: StageSettings = stage(5000, 48, 2e-3, weight_decay=0.1)
    gate_named: float = 0.95

    def __post_init__(self) -> None:
        """Raises ConfigError: sizes that do not fit each other."""
        tower, unet, llm = self.tower, self.unet, self.llm
        check_multiples(
            ("tower.features", tower.features, 4, "sines and cosines along both sides"),
            ("tower.features", tower.features, tower.pool_heads, "tower.pool_heads"),
            ("unet.dim", unet.dim, unet.heads, "unet.heads"), ("unet.prompt", unet.prompt, 2, "two text encoders"),
            *(("unet.channels", width, 8, "groups of the U-Net") for width in unet.channels or [0]),
            ("layout.hidden", self.layout.hidden, 8, "groups of the layout decoder"),
            ("llm.width", llm.width, 4 * llm.heads, "sines, and pairs of numbers in each of llm.heads"))
