"""Benchmarks whose drawings another model judges: drawn by a system, or found in a folder.

GenEval's layout    FOLDER/00000/samples/0000.png: prompt, then image; drawings of a run are written
                    so to OUT/images, with the prompt's metadata.jsonl
DPG-Bench's grid    FOLDER/ITEM.png: one image, or up to four as two rows of two
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from PIL import Image

from seed_multimodal.device import choose_device
from seed_multimodal.disk import JsonObject, replace_text, writing
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Images, Judging, Line, Run
from seed_multimodal.evaluation.drawing import CaptionDrawer
from seed_multimodal.evaluation.metrics import Estimate, mean_of_means, plain
from seed_multimodal.images.io import open_image, save_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.pipelines.base import MultimodalSystem

MAX_GRID = 4
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS = 8


@dataclass
class JudgedPrompt(Sample):
    """A prompt of such a benchmark: its only reference; `metadata`: its item in the file."""

    metadata: JsonObject = field(default_factory=dict)


class ImageLayout(Protocol):
    """Where the images of a prompt lie below `folder`."""

    def save(
        self, folder: Path, index: int, sample: JudgedPrompt, images: Sequence[Image.Image]
    ) -> None:
        """Write images. Raises DataError: the disk refuses."""
        ...

    def files(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Path]:
        """The files with up to `count` images. Raises ImageError: none."""
        ...

    def read(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Image.Image]:
        """Open up to `count` images. Raises ImageError: none."""
        ...


class SampleFolders:
    """GenEval's layout."""

    def save(
        self, folder: Path, index: int, sample: JudgedPrompt, images: Sequence[Image.Image]
    ) -> None:
        target = folder / f"{index:05d}"
        with writing(target, DataError):
            target.mkdir(parents=True, exist_ok=True)
            replace_text(target / "metadata.jsonl", json.dumps(sample.metadata) + "\n")
        for number, image in enumerate(images):
            save_image(image, target / "samples" / f"{number:04d}.png", DataError)

    def files(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Path]:
        samples = folder / f"{index:05d}" / "samples"
        files = sorted(file for file in samples.glob("*") if file.suffix in IMAGE_SUFFIXES)
        if not files:
            raise ImageError(f"there is no image in {samples}.")
        return files[:count]

    def read(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Image.Image]:
        return [open_image(file).image for file in self.files(folder, index, sample, count)]


class GridFiles:
    """DPG-Bench's layout: a file named after the item; several images are tiles of a grid."""

    def save(
        self, folder: Path, index: int, sample: JudgedPrompt, images: Sequence[Image.Image]
    ) -> None:
        image = images[0]
        if len(images) > 1:
            width, height = image.size
            image = Image.new("RGB", (2 * width, 2 * height))
            for number, tile in enumerate(images):
                image.paste(tile, (number % 2 * width, number // 2 * height))
        save_image(image, folder / f"{sample.key}.png", DataError)

    def files(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Path]:
        names = [folder / f"{sample.key}{suffix}" for suffix in IMAGE_SUFFIXES]
        file = next((name for name in names if name.is_file()), None)
        if file is None:
            raise ImageError(f"there is no image {names[0]}.")
        return [file]

    def read(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Image.Image]:
        (file,) = self.files(folder, index, sample, count)
        image = open_image(file).image
        if count == 1:
            return [image]
        width, height = (side // 2 for side in image.size)
        tiles: list[Image.Image] = []
        for number in range(count):
            left, top = number % 2 * width, number // 2 * height
            tiles.append(image.crop((left, top, left + width, top + height)))
        return tiles


class JudgedDrawings:
    """A benchmark of drawings; subclasses judge them.

    system: draws; None: the images are in `run.judging.image_folder`.
    """

    layout: ClassVar[ImageLayout] = SampleFolders()

    def __init__(
        self, system: MultimodalSystem | None, run: Run, samples: Sequence[JudgedPrompt]
    ) -> None:
        assert run.judging is not None
        self.run = run
        self.judging: Judging = run.judging
        self.samples = {sample.key: sample for sample in samples}
        self.indices = {sample.key: index for index, sample in enumerate(samples)}
        self.drawer = None if system is None else CaptionDrawer(system, run, samples)
        self.folder = self.judging.image_folder or run.out / "images"
        if isinstance(self.layout, GridFiles) and run.best_of > MAX_GRID:
            raise ConfigError(f"A grid holds {MAX_GRID} images at most, not {run.best_of}.")
        self.device: torch.device = choose_device(self.judging.device, log=None).device

    def answer(self, samples: Sequence[JudgedPrompt], images: Images) -> list[Line]:
        """Draw or open the images of a batch, and judge them."""
        # 1. The images of each prompt.
        drawings: list[list[Image.Image]] = []
        if self.drawer is None:
            for sample in samples:
                index = self.indices[sample.key]
                drawings.append(self.layout.read(self.folder, index, sample, self.run.best_of))
        else:
            drawings = self.drawer.draw(samples)
            for sample, of_prompt in zip(samples, drawings, strict=True):
                self.layout.save(self.folder, self.indices[sample.key], sample, of_prompt)

        # 2. What the judge says about them, and which images of a folder these were.
        lines: list[Line] = []
        for sample, of_prompt in zip(samples, drawings, strict=True):
            line = self.line_of(sample, of_prompt)
            if self.drawer is None:
                line["files"] = self.file_states(sample)
            lines.append(line)
        return lines

    def file_states(self, sample: JudgedPrompt) -> list[tuple[str, int, int]]:
        """Name, size and time of the files of a prompt in the folder. Raises ImageError: none."""
        index = self.indices[sample.key]
        states: list[tuple[str, int, int]] = []
        for file in self.layout.files(self.folder, index, sample, self.run.best_of):
            stat = file.stat()
            states.append((file.name, stat.st_size, stat.st_mtime_ns))
        return states

    def is_current(self, line: Line) -> bool:
        """Whether the images that a line of an earlier run judges are still there."""
        sample = self.samples.get(line["id"])
        if sample is None:
            return True
        try:
            states = self.file_states(sample)
        except (ImageError, OSError):
            return False
        return self.drawer is not None or line.get("files") == [list(state) for state in states]

    def line_of(self, sample: JudgedPrompt, images: Sequence[Image.Image]) -> Line:
        """What the judge says about the images of a prompt."""
        raise NotImplementedError

    def write_sheet(
        self,
        samples: Sequence[JudgedPrompt],
        captions: Sequence[Sequence[str]],
        groups: Sequence[str],
    ) -> None:
        """Write OUT/sheet.png: of each group the first images, with their captions."""
        rows: dict[str, Row] = {}
        for sample, texts, group in zip(samples, captions, groups, strict=True):
            row = rows.setdefault(group, Row(group))
            index = self.indices[sample.key]
            if len(row.cells) >= SHEET_COLUMNS or not texts:
                continue
            image = self.layout.read(self.folder, index, sample, self.run.best_of)[0]
            row.cells.append(Cell(image, texts[0], sample.caption))
        sheet = contact_sheet(list(rows.values()), str(self.run.out), columns=SHEET_COLUMNS)
        save_image(sheet, self.run.out / "sheet.png", DataError)


def most_images(per_prompt: Iterable[Sequence[object]]) -> int:
    """The largest number of images of a prompt; one without images has as many wrong ones."""
    return max((len(images) for images in per_prompt), default=1)


def score_values(kinds: Mapping[str, Estimate]) -> JsonObject:
    """The mean over kinds of prompts, and each of them, with intervals."""
    values: JsonObject = {"score": plain(mean_of_means(list(kinds.values())))}
    values["kinds"] = {name: plain(estimate) for name, estimate in kinds.items()}
    return values
