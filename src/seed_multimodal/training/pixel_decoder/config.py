"""Settings of a pixel decoder's training: images, models, trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seed_multimodal.config import project_path
from seed_multimodal.data.formats.pairs import Pairs, open_pairs
from seed_multimodal.data.stream.targets import Size, TargetView
from seed_multimodal.diffusion.objectives import FlowTimes
from seed_multimodal.diffusion.training import ConditionDropout, TrainedLayers
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import fraction, non_negative, positive, setting
from seed_multimodal.training.config import RunTrainerSettings, refuse_unread
from seed_multimodal.training.hydra_task import RunSettings


@dataclass
class ImageSource:
    """One source of images.

    Attributes:
        files: folders of images, tars, lists (jsonl, json) or tables.
        condition_key: for edits, the key of the image before the edit (`source_image`; `image_key`:
            after it).
        weight: relative share of draws.
        options: further arguments of `formats.pairs`.
        format_options: of a registered format.
    """

    name: str
    files: str | list[str] = ""
    format: str = "auto"
    image_root: str | None = None
    image_key: str | None = None
    condition_key: str | None = None
    weight: float = setting(1.0, above=0)
    options: dict[str, Any] = setting(factory=dict)
    format_options: dict[str, Any] = setting(factory=dict)

    def open(self) -> Pairs:
        """Open the images. Raises as `open_pairs`."""
        not_read = ("name", "weight", "options")
        keys = {key: value for key, value in vars(self).items() if value and key not in not_read}
        return open_pairs(keys | self.options, captioned=False)


@dataclass
class ImageData:
    """The images of a run.

    Attributes:
        batch_size: of a micro-step in each process.
        resolution, sizes, keep_ratio, encoder_size: see `targets.TargetView`.
        max_bad_in_a_row: consecutive unusable images that stop the run.
        held_out: source of the sample images during training; None: the first source.
    """

    sources: list[ImageSource]
    batch_size: int = positive(4)
    resolution: int = setting(1024, minimum=8)
    sizes: tuple[Size, ...] = ()
    encoder_size: int = positive(448)
    keep_ratio: bool = True
    seed: int = non_negative(0)
    max_bad_in_a_row: int = positive(20)
    held_out: ImageSource | None = None

    @property
    def view(self) -> TargetView:
        """Target and conditioning crops of an image."""
        return TargetView(self.resolution, self.encoder_size, self.keep_ratio, self.sizes)


@dataclass(kw_only=True)
class PixelModel:
    """Trained and frozen models; subclasses add their folders, which may be below the project root.

    Attributes:
        start: an earlier result to start from, or "".
        trained: parameters of the denoiser.
        seed: of new weights.
        flow_times: distribution of times, where the scheduler samples a flow.
        teacher: a decoder to distil, see `pixel_decoder.distill`; the student starts as it, or as
            `start`.
        teacher_steps: its number of steps.
        teacher_guidance: its guidance scale; None: that of its folder.
        student_steps: number of steps without guidance; a divisor of `teacher_steps`.
    """

    start: str = ""
    teacher: str = ""
    teacher_steps: int = positive(20)
    teacher_guidance: float | None = None
    student_steps: int = positive(4)
    trained: TrainedLayers = "all"
    gradient_checkpointing: bool = False
    seed: int = non_negative(0)
    flow_times: FlowTimes = "logit_normal"

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Path):
                setattr(self, item.name, project_path(value))
        self.start = str(project_path(self.start)) if self.start else ""
        self.teacher = str(project_path(self.teacher)) if self.teacher else ""
        if not self.teacher:
            names = ("teacher_steps", "teacher_guidance", "student_steps")
            refuse_unread(self, names, "model", "without model.teacher")
        if self.teacher_steps % self.student_steps:
            raise ConfigError(
                f"model: teacher_steps must be a multiple of student_steps, not "
                f"{self.teacher_steps} and {self.student_steps}."
            )

    @property
    def diffusion_folder(self) -> Path:
        """The diffusers folder of VAE and noise schedule."""
        raise NotImplementedError

    @property
    def condition_dropout(self) -> ConditionDropout:
        """Shares of samples without conditions, for guidance."""
        raise NotImplementedError


@dataclass(kw_only=True)
class CodesPixelModel(PixelModel):
    """Of a decoder that draws a tokenizer's codes.

    Attributes:
        diffusion: a diffusers folder, of which subclasses say what is read; with `start` or
            `teacher` not read, since these are complete.
        dropout: share of images without conditions, for guidance.
    """

    diffusion: Path
    dropout: float = fraction(0.1)

    @property
    def diffusion_folder(self) -> Path:
        return Path(self.teacher or self.start or self.diffusion)

    @property
    def condition_dropout(self) -> ConditionDropout:
        return ConditionDropout(embeds=self.dropout, image=0.0, both=0.0)


@dataclass
class CodesImages(ImageData):
    """The images of such a run."""

    encoder_size: int = positive(224)


@dataclass
class PixelTrainer(RunTrainerSettings):
    """Settings of the trainer.

    Attributes:
        save_frozen: False: resuming loads the frozen part of the denoiser from its original files;
            the result of a run is complete anyway.
    """

    save_frozen: bool = False


@dataclass(kw_only=True)
class PixelRunSettings(RunSettings):
    """Settings of a pixel decoder's run."""

    model: PixelModel
    data: ImageData
    trainer: PixelTrainer
