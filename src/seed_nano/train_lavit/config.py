"""Settings of nano-lavit: sizes of every part and length of every stage, from one YAML file (configs/nano_lavit/)."""

from __future__ import annotations

from dataclasses import dataclass, field

from seed_multimodal.settings import setting
from seed_multimodal.training.loop_settings import StageSettings, stage
from seed_nano.train_x.config import LanguageSizes, LayoutSizes, check_multiples

KINDS = {"captions": 0.5, "qa": 0.36, "edits": 0.12, "asides": 0.02}
"""Shares of the language model's sequences: content of the data format `nano` -> share."""
READ_FIRST = 0.35  # share of the captions of which the picture comes first


@dataclass
class TokenizerSizes:
    """Merger, codebook and code decoder; their width is that of nano's tower.

    `keep`: share of the patches to be kept (published: a third), `first_keep`: before the stage `narrow`; `ratio`:
    weight of that in the loss (published: 2; a patch is a sixteenth of a picture here). `reading`: numbers of a patch
    from which labels are read.
    """

    merger_depth: int = setting(1, least=1)
    merger_mlp: int = setting(288, least=1)
    heads: int = setting(6, least=1)
    codes: int = setting(1024, least=2)
    code_dim: int = setting(16, least=1)
    decoder_depth: int = setting(2, least=1)
    decoder_mlp: int = setting(256, least=1)
    keep: float = setting(0.36, above=0, most=1)
    first_keep: float = setting(0.45, above=0, most=1)
    ratio: float = setting(10.0, least=0)
    reading: int = setting(24, least=1)


@dataclass
class UnetSizes:
    """The SDXL-class U-Net; it reads prompts of `prompt` + `pooled` numbers."""

    channels: list[int] = setting(factory=lambda: [24, 40], least=1)
    heads: int = setting(2, least=1)
    prompt: int = setting(16, least=1)
    pooled: int = setting(16, least=1)


@dataclass
class NanoLavitConfig:
    """Everything one run needs; the resolved file is saved beside its outputs.

    Attributes:
        start: a finished nano, whose vision tower and autoencoder nano-lavit has in common with it.
        pool: scenes of which the tower's features are kept; `drawn`: those of them of which latents are kept, too.
        gate_scenes, workers, device: as of nano's settings.
        records: records of an epoch of each kind.
        gate_cosine: greatest loss with which pictures of val may be rebuilt.
    """

    start: str = "pretrained/nano"
    image_size: int = setting(64, least=32)
    pool: int = setting(100_000, least=8)
    drawn: int = setting(40_000, least=8)
    gate_scenes: int = setting(1000, least=1)
    workers: int = setting(0, least=0)
    device: str = "auto"
    seed: int = 0
    tokenizer: TokenizerSizes = field(default_factory=TokenizerSizes)
    layout: LayoutSizes = field(default_factory=lambda: LayoutSizes(width=96, features=24))
    unet: UnetSizes = field(default_factory=UnetSizes)
    llm: LanguageSizes = field(default_factory=lambda: LanguageSizes(ffn=320, positions=256))
    records: int = setting(400_000, least=1)
    train_reader: StageSettings = stage(3000, 512, 3e-3, weight_decay=0.02)
    train_tokenizer: StageSettings = stage(14000, 128, 1.5e-3, ema=0.99)
    train_narrow: StageSettings = stage(2000, 128, 8e-4, ema=0.99)
    train_layout: StageSettings = stage(2500, 96, 2e-3, ema=0.998)
    train_pixels: StageSettings = stage(3000, 32, 2e-3, ema=0.995)
    train_llm: StageSettings = stage(5000, 64, 2e-3, weight_decay=0.1)
    gate_cosine: float = setting(0.2, above=0)

    def __post_init__(self) -> None:
        """Raises ConfigError: sizes that do not fit each other."""
        unet, llm = self.unet, self.llm
        check_multiples(
            *(("unet.channels", width, 8, "groups of the U-Net") for width in unet.channels or [0]),
            ("layout.hidden", self.layout.hidden, 8, "groups of the layout decoder"),
            ("llm.width", llm.width, 2 * llm.heads, "pairs of numbers in each of llm.heads"))
