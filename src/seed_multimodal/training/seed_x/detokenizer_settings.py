"""Typed settings of the de-tokenizer's training, behind `MultiModalLLM/configs/seed_x_detokenizer/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seed_multimodal.data.stream.drawn_pairs import DrawnView
from seed_multimodal.detokenizers.sdxl_adapter import Trained
from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes
from seed_multimodal.detokenizers.sdxl_training import ConditionDropout
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, read_settings, setting
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.llm.trainer_settings import LoopTrainerSettings
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.optimizers import OptimSettings
from seed_multimodal.vision.qwen_vit import QwenVitConfig

GROUPS = ("model", "data", "optim", "trainer")
DEEPSPEED = "deepspeed"  # a group that may be left out


@dataclass
class DetokenizerModel:
    """What is trained, and what it is trained with.

    Attributes:
        stage: 1: drawing from embeddings; 2: beside a condition picture.
        sdxl: SDXL's diffusers folder: U-Net (without `start`), autoencoder and noise schedule.
        tower: the vision tower's weights, as `QwenVit.from_pretrained`; tower_sizes: None for the released ones, or
            those beside the weights.
        start: an adapter to begin with, for stage 2 the first stage's; "": SDXL's U-Net and a new resampler.
        resampler: sizes of the new resampler.
        trained: `key_value` (and the resampler; the paper's first stage) or `all` (the released second stage).
        tokens: embeddings of a picture after pooling, 64 by the paper; 0 or the tower's own number: no pooling.
        dropout, min_snr: see `AdapterLoss`.
        seed: of the new resampler.
    """

    sdxl: Path
    tower: Path
    stage: Literal[1, 2] = 1
    tower_sizes: QwenVitConfig | None = None
    start: str = ""
    resampler: ResamplerSizes = setting(factory=ResamplerSizes)
    trained: Trained = "key_value"
    tokens: int = setting(64, least=0)
    dropout: ConditionDropout = setting(factory=ConditionDropout)
    min_snr: float | None = setting(None, above=0)
    gradient_checkpointing: bool = False
    seed: int = setting(0, least=0)


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
class DetokenizerData:
    """The pictures of a run.

    Attributes:
        batch_size: pictures of a micro-step in each process.
        resolution, keep_ratio: see `drawn_pairs.DrawnView`.
        max_bad_in_a_row: this many unusable pictures one after another end the run.
        cache: a folder where what tower and autoencoder make of each picture is kept (1 MB at the released sizes).
            It is filled before the training, which then holds neither of the two; "": both run in every step.
    """

    sources: list[PictureSource]
    batch_size: int = setting(4, least=1)
    resolution: int = setting(1024, least=8)
    tower_size: int = setting(448, least=1)
    keep_ratio: bool = True
    seed: int = setting(0, least=0)
    max_bad_in_a_row: int = setting(20, least=1)
    cache: str = ""

    @property
    def view(self) -> DrawnView:
        """What is drawn and seen of a picture."""
        return DrawnView(self.resolution, self.tower_size, self.keep_ratio)


@dataclass
class DetokenizerTrainer(LoopTrainerSettings):
    """Settings of the loop.

    Attributes:
        ema: decay of the averaged weights, which are the result (0: none).
        save_frozen: whether checkpoints hold the frozen part of the U-Net, too. Without, a resume reads it from
            `model.sdxl` (or `model.start`) again; the adapter that a run ends with is always whole.
    """

    ema: float = setting(0.0, least=0, below=1)
    save_frozen: bool = False

    def loop_settings(self) -> LoopSettings:
        """The same for the loop."""
        made = super().loop_settings()
        made.ema, made.save_frozen = self.ema, self.save_frozen
        return made


@dataclass
class DetokenizerRun:
    """A whole run; `plain` is the resolved configuration, `deepspeed` a block of `zero.fill_config`."""

    output_dir: Path
    model: DetokenizerModel
    data: DetokenizerData
    optim: OptimSettings
    trainer: DetokenizerTrainer
    plain: dict[str, Any]
    deepspeed: dict[str, Any] | None = None


def read_detokenizer_run(config: Mapping[str, Any]) -> DetokenizerRun:
    """Check a resolved configuration.

    Raises:
        ConfigError: a key that is unknown, missing, of the wrong type or out of range, or values that do not go
            together.
    """
    check_keys(config, ("output_dir", *GROUPS, DEEPSPEED), "configuration")
    if not config.get("output_dir"):
        raise ConfigError("configuration: output_dir is needed: the folder for checkpoints, logs and the adapter.")
    for group in GROUPS:
        if not isinstance(config.get(group), Mapping):
            raise ConfigError(f"configuration: {group} is needed: choose one of configs/seed_x_detokenizer/{group} "
                              f"({group}=NAME) or a file.")
    run = DetokenizerRun(
        Path(str(config["output_dir"])), read_settings(DetokenizerModel, config["model"], "model"),
        read_settings(DetokenizerData, config["data"], "data"), read_settings(OptimSettings, config["optim"], "optim"),
        read_settings(DetokenizerTrainer, config["trainer"], "trainer"), dict(config), config.get(DEEPSPEED) or None)
    _check_sources(run)
    _check_zero(run)
    model = run.model
    model.sdxl, model.tower = find_folder(model.sdxl), find_folder(model.tower)
    model.start = str(find_folder(model.start)) if model.start else ""
    return run


def _check_zero(run: DetokenizerRun) -> None:
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


def _check_sources(run: DetokenizerRun) -> None:
    """Conditions on several settings."""
    sources = run.data.sources
    if not sources:
        raise ConfigError("data: sources must list at least one source of pictures.")
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"data: there are two sources named {twice!r}.")
    edits = next((source.name for source in sources if source.condition_key), None)
    if run.model.stage == 1 and edits is not None:
        raise ConfigError(f"data: source {edits!r} has a condition_key, but the first stage reads no condition picture "
                          "(model.stage=2 does).")
    sizes = run.model.tower_sizes
    if sizes is not None and run.data.tower_size != sizes.image_size:
        raise ConfigError(f"data: tower_size is {run.data.tower_size}, but the tower of model.tower_sizes sees "
                          f"{sizes.image_size} pixels a side.")
