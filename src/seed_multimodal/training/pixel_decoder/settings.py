"""Typed settings that the trainings of pixel decoders share; each system has its own `model` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from seed_multimodal.data.stream.drawn_pairs import DrawnView, Size
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, read_settings, setting
from seed_multimodal.training.config import LoopSettings
from seed_multimodal.training.llm.trainer_settings import LoopTrainerSettings
from seed_multimodal.training.optimizers import OptimSettings

GROUPS = ("model", "data", "optim", "trainer")
DEEPSPEED = "deepspeed"  # a group that may be left out
M = TypeVar("M")


@dataclass
class PictureSource:
    """One source of pictures.

    Attributes:
        files: folders of pictures, tars, lists (jsonl, json) or tables; `format`, `image_root`, `image_key` as of
            `formats.pairs.Pairs`.
        condition_key: of edits: the key of the picture before (`source_image`; `image_key` names that after).
        options: further arguments of `Pairs`, or of `NanoPairs`.
        weight: share of the draws, relative to the other sources'.
    """

    name: str
    files: str | list[str] = ""
    format: str = "auto"
    image_root: str | None = None
    image_key: str | None = None
    condition_key: str | None = None
    weight: float = setting(1.0, above=0)
    options: dict[str, Any] = setting(factory=dict)

    def spec(self) -> dict[str, Any]:
        """For `drawn_pairs.open_pictures`."""
        given = {"files": self.files, "format": self.format, "image_root": self.image_root,
                 "image_key": self.image_key, "condition_key": self.condition_key, **self.options}
        return {key: value for key, value in given.items() if value not in (None, "")}


@dataclass
class PictureData:
    """The pictures of a run.

    Attributes:
        batch_size: pictures of a micro-step in each process.
        resolution, sizes, keep_ratio: see `drawn_pairs.DrawnView`.
        max_bad_in_a_row: this many unusable pictures one after another end the run.
        cache: a folder where what the frozen models make of each picture is kept (1 MB at SEED-X's released sizes). It
            is filled before the training, which then holds none of them; "": they run in every step.
    """

    sources: list[PictureSource]
    batch_size: int = setting(4, least=1)
    resolution: int = setting(1024, least=8)
    sizes: tuple[Size, ...] = ()
    tower_size: int = setting(448, least=1)
    keep_ratio: bool = True
    seed: int = setting(0, least=0)
    max_bad_in_a_row: int = setting(20, least=1)
    cache: str = ""

    @property
    def view(self) -> DrawnView:
        """What is drawn and seen of a picture."""
        return DrawnView(self.resolution, self.tower_size, self.keep_ratio, self.sizes)

    @property
    def drawn_sizes(self) -> tuple[Size, ...]:
        """Heights and widths of what is drawn."""
        return self.sizes or ((self.resolution, self.resolution),)


@dataclass
class PixelTrainer(LoopTrainerSettings):
    """Settings of the loop.

    Attributes:
        ema: decay of the averaged weights, which are the result (0: none).
        save_frozen: whether checkpoints hold the frozen part of the U-Net, too. Without, a resume reads it where the
            run began (`model.start`, or the model's diffusers folder); the result of a run is always whole.
    """

    ema: float = setting(0.0, least=0, below=1)
    save_frozen: bool = False

    def loop_settings(self) -> LoopSettings:
        """The same for the loop."""
        made = super().loop_settings()
        made.ema, made.save_frozen = self.ema, self.save_frozen
        return made


@dataclass
class PixelRun(Generic[M]):
    """A whole run; `plain` is the resolved configuration, `deepspeed` a block of `zero.fill_config`."""

    output_dir: Path
    model: M
    data: PictureData
    optim: OptimSettings
    trainer: PixelTrainer
    plain: dict[str, Any]
    deepspeed: dict[str, Any] | None = None


def read_pixel_run(config: Mapping[str, Any], model: type[M], data: type[PictureData] = PictureData, *, configs: str,
                   result: str) -> PixelRun[M]:
    """Check a resolved configuration.

    Args:
        model, data: classes of those settings. configs: folder of the configurations. result: what a run makes.

    Raises:
        ConfigError: a key that is unknown, missing, of the wrong type or out of range, or values that do not go
            together.
    """
    check_keys(config, ("output_dir", *GROUPS, DEEPSPEED), "configuration")
    if not config.get("output_dir"):
        raise ConfigError(f"configuration: output_dir is needed: the folder for checkpoints, logs and the {result}.")
    for group in GROUPS:
        if not isinstance(config.get(group), Mapping):
            raise ConfigError(f"configuration: {group} is needed: choose one of configs/{configs}/{group} "
                              f"({group}=NAME) or a file.")
    run = PixelRun(
        Path(str(config["output_dir"])), read_settings(model, config["model"], "model"),
        read_settings(data, config["data"], "data"), read_settings(OptimSettings, config["optim"], "optim"),
        read_settings(PixelTrainer, config["trainer"], "trainer"), dict(config), config.get(DEEPSPEED) or None)
    _check_sources(run.data)
    _check_zero(run)
    return run


def _check_zero(run: PixelRun[Any]) -> None:
    """What does not go with DeepSpeed."""
    if run.deepspeed is None:
        return
    if not isinstance(run.deepspeed, Mapping):
        raise ConfigError(f"configuration: deepspeed must be a file of configs/deepspeed, not {run.deepspeed!r}.")
    zero = run.deepspeed.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage not in (1, 2, 3):
        raise ConfigError("deepspeed: zero_optimization.stage must be 1 or 2.")
    if stage == 3:
        raise ConfigError("deepspeed: ZeRO 3 is not built in for the de-tokenizer, whose weights (5 GiB in half "
                          "precision) fit on every GPU; use stage 1 or 2.")
    if run.trainer.ema:
        raise ConfigError("trainer: ema is not built in with DeepSpeed; set trainer.ema=0, or leave deepspeed out.")


def _check_sources(data: PictureData) -> None:
    """Conditions on several settings."""
    if not data.sources:
        raise ConfigError("data: sources must list at least one source of pictures.")
    names = [source.name for source in data.sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"data: there are two sources named {twice!r}.")
