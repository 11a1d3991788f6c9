"""Benchmarks whose drawings another model judges: drawn by a system, or found in a folder.

GenEval's layout    FOLDER/00000/samples/0000.png: prompt, then image; drawings of a run are written
                    so to OUT/images, with the prompt's metadata.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from PIL import Image

from seed_multimodal.disk import JsonObject, replace_text, writing
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line, Settings
from seed_multimodal.evaluation.text2image import draw_captions
from seed_multimodal.images.io import open_image, save_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.settings import setting

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS = 8


@dataclass(kw_only=True)
class JudgedSettings(Settings):
    """Settings of judged drawings."""

    file: Path = setting(
        flag="--data", metavar="PATH", help="the benchmark's file of prompts or its folder"
    )
    judge: Path = setting(
        metavar="MODEL",
        help="folder of an image-text model of transformers, or a system (nano, seed-x-i …)",
    )
    image_folder: Path | None = setting(
        None, metavar="DIR", help="judge these drawings; no model is loaded"
    )
    num_images: int | None = setting(
        None, minimum=1, metavar="N", help="drawings of a prompt (default: the paper's)"
    )


@dataclass
class JudgedPrompt(Sample):
    """A prompt of such a benchmark: its only reference; `metadata`: its item in the file."""

    metadata: JsonObject = field(default_factory=dict)


SettingsT = TypeVar("SettingsT", bound=JudgedSettings)
PromptT = TypeVar("PromptT", bound=JudgedPrompt)


@dataclass(frozen=True)
class JudgedImage:
    """What the judge says about image `number` of the prompt with this index, if it is there."""

    index: int
    number: int
    sample: Any
    verdict: Any
    exists: bool


class JudgedDrawings(Benchmark[SettingsT, PromptT]):
    """Drawings of prompts, in GenEval's layout; subclasses judge them.

    Attributes:
        file_name: of the published file of prompts.
        num_images: drawings of a prompt in the paper.
        verdicts: field of a line: what the judge says about each image.
    """

    options_of = "text2image"
    draws = True
    settings_class = JudgedSettings
    file_name: ClassVar[str]
    num_images: ClassVar[int] = 1
    verdicts: ClassVar[str]

    def __init__(self, settings: SettingsT) -> None:
        if settings.file.is_dir():
            settings = replace(settings, file=settings.file / self.file_name)
        self.count = settings.num_images or self.num_images
        super().__init__(replace(settings, num_images=self.count))
        folder = settings.image_folder
        if folder is not None and not folder.exists():
            raise ConfigError(f"{folder}: no such folder.")
        self.folder = folder or settings.out / "images"

    @property
    def judge_device(self) -> torch.device:
        """The device of the judge."""
        from seed_multimodal.device import choose_device

        return choose_device(self.settings.device, log=None).device

    def prepare(self, samples: Sequence[PromptT]) -> None:
        self.prompts = {sample.key: sample for sample in samples}
        self.indices = {sample.key: index for index, sample in enumerate(samples)}

    def answer(self, samples: Sequence[PromptT], images: Images) -> list[Line]:
        """Draw or open the images of a batch, and judge them."""
        # 1. The images of each prompt.
        are_drawn = self.settings.image_folder is None
        drawings: list[list[Image.Image]] = []
        if are_drawn:
            indices = [self.indices[sample.key] for sample in samples]
            drawings = draw_captions(self.system, self.settings, samples, indices, self.count)
            for sample, of_prompt in zip(samples, drawings, strict=True):
                self.save(sample, of_prompt)
        else:
            drawings = [self.read(sample) for sample in samples]

        # 2. What the judge says about them, and which images of a folder these were.
        lines: list[Line] = []
        for sample, of_prompt in zip(samples, drawings, strict=True):
            line = {"caption": sample.caption, self.verdicts: self.judge(sample, of_prompt)}
            if not are_drawn:
                line["files"] = self.file_states(sample)
            lines.append(line)
        return lines

    def judge(self, sample: PromptT, images: Sequence[Image.Image]) -> Any:
        """What the judge says about each image of a prompt."""
        raise NotImplementedError

    def is_current(self, line: Line) -> bool:
        """Whether the images that a line of an earlier run judges are still there."""
        sample = self.prompts.get(line["id"])
        if sample is None:
            return True
        try:
            states = self.file_states(sample)
        except (ImageError, OSError):
            return False
        return self.settings.image_folder is None or line.get("files") == states

    def file_states(self, sample: PromptT) -> list[list[object]]:
        """Name, size and time of the files of a prompt. Raises ImageError: none."""
        states: list[list[object]] = []
        for file in self.files(sample):
            stat = file.stat()
            states.append([file.name, stat.st_size, stat.st_mtime_ns])
        return states

    # ---- where the images of a prompt lie

    def save(self, sample: PromptT, images: Sequence[Image.Image]) -> None:
        """Write drawings. Raises DataError: the disk refuses."""
        target = self.folder / f"{self.indices[sample.key]:05d}"
        with writing(target, DataError):
            target.mkdir(parents=True, exist_ok=True)
            replace_text(target / "metadata.jsonl", json.dumps(sample.metadata) + "\n")
        for number, image in enumerate(images):
            save_image(image, target / "samples" / f"{number:04d}.png", DataError)

    def files(self, sample: PromptT) -> list[Path]:
        """The files with the images of a prompt. Raises ImageError: none."""
        folder = self.folder / f"{self.indices[sample.key]:05d}" / "samples"
        files = sorted(file for file in folder.glob("*") if file.suffix in IMAGE_SUFFIXES)
        if not files:
            raise ImageError(f"there is no image in {folder}.")
        return files[: self.count]

    def read(self, sample: PromptT) -> list[Image.Image]:
        """The images of a prompt. Raises ImageError: none."""
        return [open_image(file).image for file in self.files(sample)]

    # ---- for scores

    def judged_images(self, samples: Sequence[PromptT], lines: Sequence[Line]) -> list[JudgedImage]:
        """All images; a prompt without images has as many wrong ones as others have images."""
        n_missing = max((len(line.get(self.verdicts, [])) for line in lines), default=0) or 1
        images: list[JudgedImage] = []
        for index, (sample, line) in enumerate(zip(samples, lines, strict=True)):
            exists = self.verdicts in line
            verdicts = line[self.verdicts] if exists else [None] * n_missing
            for number, verdict in enumerate(verdicts):
                images.append(JudgedImage(index, number, sample, verdict, exists))
        return images

    def write_sheet(
        self, images: Sequence[JudgedImage], captions: Sequence[str], groups: Sequence[str]
    ) -> None:
        """Write OUT/sheet.png: of each group the first images, with their captions."""
        rows: dict[str, Row] = {}
        for image, caption, group in zip(images, captions, groups, strict=True):
            row = rows.setdefault(group, Row(group))
            if image.number == 0 and image.exists and len(row.cells) < SHEET_COLUMNS:
                first = self.read(image.sample)[0]
                row.cells.append(Cell(first, caption, image.sample.caption))
        out = self.settings.out
        sheet = contact_sheet(list(rows.values()), str(out), columns=SHEET_COLUMNS)
        save_image(sheet, out / "sheet.png", DataError)
