"""Benchmarks whose drawings another model judges: drawn by a system, or found in a folder.

GenEval's layout    FOLDER/00000/samples/0000.png: prompt, then image; drawings of a run are written
                    so to OUT/images, with the prompt's metadata.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from seed_multimodal.disk import JsonObject, replace_text, writing
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line
from seed_multimodal.evaluation.metrics import Estimate, bootstrap
from seed_multimodal.images.io import open_image, save_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.settings import positive, setting

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS = 8


@dataclass
class JudgedPrompt(Sample):
    """A prompt of such a benchmark: its only reference.

    metadata: its item in the file. group: its row of the sheet.
    """

    metadata: JsonObject = field(default_factory=dict)
    group: str = "drawings"


PromptT = TypeVar("PromptT", bound=JudgedPrompt)


@dataclass
class JudgedImage:
    """What the judge says about image `number` of a prompt.

    fault: why there is no image.
    score, caption: of the benchmark, for its figures and the sheet.
    """

    sample: Any
    number: int
    verdict: Any
    fault: str
    score: float = 0.0
    caption: str = ""


def estimate(images: Sequence[JudgedImage], values: Sequence[float]) -> Estimate:
    """The mean of a value of each image; those of a prompt are resampled together."""
    return bootstrap(values, [image.sample.index for image in images])


@dataclass(kw_only=True)
class JudgedDrawings(Benchmark[PromptT]):
    """Drawings of prompts, in GenEval's layout; subclasses judge them.

    Attributes:
        file_name: of the published file of prompts.
        images_per_prompt: in the paper.
        verdicts: field of a line: what the judge says about each image.
    """

    options_of = "text2image"
    draws = True
    file_name: ClassVar[str]
    images_per_prompt = 1
    verdicts: ClassVar[str]

    file: str | Path = setting(
        flag="--data", metavar="PATH", help="the benchmark's file of prompts or its folder"
    )
    judge: Path = setting(
        metavar="MODEL",
        help="folder of an image-text model of transformers, or a system (nano, seed-x-i …)",
    )
    image_folder: Path | None = setting(
        None, metavar="DIR", help="judge these drawings; no model is loaded"
    )
    num_images: int | None = positive(
        None, metavar="N", help="drawings of a prompt (default: the paper's)"
    )

    def __post_init__(self) -> None:
        if Path(self.file).is_dir():
            self.file = Path(self.file) / self.file_name
        if self.num_images is None:
            self.num_images = self.images_per_prompt
        self.count = self.num_images
        self.folder = self.image_folder or self.out / "images"
        if self.image_folder is not None and not self.folder.exists():
            raise ConfigError(f"{self.folder}: no such folder.")

    def prepare(self, samples: Sequence[PromptT]) -> None:
        from seed_multimodal.device import choose_device

        self.judge_device = choose_device(self.device, log=None).device

    def answer(self, samples: Sequence[PromptT], images: Images) -> list[Line]:
        """Draw the images of a batch, unless they are there, and judge them."""
        # 1. The drawings, in their files.
        if self.image_folder is None:
            drawings = self.draw(samples, self.count)
            for sample, of_prompt in zip(samples, drawings, strict=True):
                self.save(sample, of_prompt)

        # 2. What the judge says about them, and which images of a folder these were.
        lines: list[Line] = []
        for sample in samples:
            verdicts = self.judged(sample, self.read(sample))
            line = {"caption": sample.caption, self.verdicts: verdicts}
            if self.image_folder is not None:
                line["files"] = self.file_states(sample)
            lines.append(line)
        return lines

    def judged(self, sample: PromptT, images: Sequence[Image.Image]) -> Any:
        """What the judge says about each image of a prompt."""
        raise NotImplementedError

    def is_current(self, sample: PromptT, line: Line) -> bool:
        """Whether the images that a line of an earlier run judges are still there."""
        try:
            states = self.file_states(sample)
        except (ImageError, OSError):
            return False
        return bool(line.get("files", states) == states)

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
        target = self.folder / f"{sample.index:05d}"
        with writing(target, DataError):
            target.mkdir(parents=True, exist_ok=True)
            replace_text(target / "metadata.jsonl", json.dumps(sample.metadata) + "\n")
        for number, image in enumerate(images):
            save_image(image, target / "samples" / f"{number:04d}.png", DataError)

    def files(self, sample: PromptT) -> list[Path]:
        """The files with the images of a prompt. Raises ImageError: none."""
        folder = self.folder / f"{sample.index:05d}" / "samples"
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
        for sample, line in zip(samples, lines, strict=True):
            verdicts = line.get(self.verdicts, [None] * n_missing)
            for number, verdict in enumerate(verdicts):
                images.append(JudgedImage(sample, number, verdict, line.get("bad", "")))
        return images

    def write_sheet(self, images: Sequence[JudgedImage]) -> None:
        """Write OUT/sheet.png: of each group the first images, with their captions."""
        rows: dict[str, Row] = {}
        for image in images:
            sample = image.sample
            row = rows.setdefault(sample.group, Row(sample.group))
            if image.number == 0 and not image.fault and len(row.cells) < SHEET_COLUMNS:
                row.cells.append(Cell(self.read(sample)[0], image.caption, sample.caption))
        sheet = contact_sheet(list(rows.values()), str(self.out), columns=SHEET_COLUMNS)
        save_image(sheet, self.out / "sheet.png", DataError)
