"""Benchmarks whose drawings another model judges: drawn by a system, or found in a folder.

GenEval's layout    FOLDER/00000/samples/0000.png: prompt, then image; drawings of a run are written
                    so to OUT/images, with the prompt's metadata.jsonl
DPG-Bench's grid    FOLDER/ITEM.png: one image, or up to four as two rows of two
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from PIL import Image

from seed_multimodal.device import choose_device
from seed_multimodal.disk import JsonObject, atomic_open, replace_text, writing
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Images, Judging, Line, Run, Scores
from seed_multimodal.evaluation.detection import (
    ColourClassifier,
    Detection,
    Limits,
    load_detector,
)
from seed_multimodal.evaluation.drawing import CaptionDrawer, find_clip
from seed_multimodal.evaluation.geneval import (
    COUNTING,
    ObjectPrompt,
    kept_detections,
    rule_faults,
)
from seed_multimodal.evaluation.metrics import Estimate, bootstrap, mean_of_means, plain
from seed_multimodal.images.io import open_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.pipelines.base import MultimodalSystem

MAX_GRID = 4
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS = 8


class ImageLayout(Protocol):
    """Where the images of a prompt lie below `folder`."""

    def save(self, folder: Path, index: int, sample: Sample, images: Sequence[Image.Image]) -> None:
        """Write images. Raises DataError: the disk refuses."""
        ...

    def read(self, folder: Path, index: int, sample: Sample, count: int) -> list[Image.Image]:
        """Open up to `count` images. Raises ImageError: none."""
        ...


class SampleFolders:
    """GenEval's layout."""

    def save(self, folder: Path, index: int, sample: Sample, images: Sequence[Image.Image]) -> None:
        target = folder / f"{index:05d}"
        metadata = {"prompt": sample.caption}
        if isinstance(sample, ObjectPrompt):
            metadata = sample.metadata
        with writing(target, DataError):
            (target / "samples").mkdir(parents=True, exist_ok=True)
            replace_text(target / "metadata.jsonl", json.dumps(metadata) + "\n")
        for number, image in enumerate(images):
            _save_png(image, target / "samples" / f"{number:04d}.png")

    def read(self, folder: Path, index: int, sample: Sample, count: int) -> list[Image.Image]:
        samples = folder / f"{index:05d}" / "samples"
        files = sorted(file for file in samples.glob("*") if file.suffix in IMAGE_SUFFIXES)
        if not files:
            raise ImageError(f"there is no image in {samples}.")
        return [open_image(file) for file in files[:count]]


class GridFiles:
    """DPG-Bench's layout: a file named after the item; several images are tiles of a grid."""

    def save(self, folder: Path, index: int, sample: Sample, images: Sequence[Image.Image]) -> None:
        image = images[0]
        if len(images) > 1:
            width, height = image.size
            image = Image.new("RGB", (2 * width, 2 * height))
            for number, tile in enumerate(images):
                image.paste(tile, (number % 2 * width, number // 2 * height))
        with writing(folder, DataError):
            folder.mkdir(parents=True, exist_ok=True)
        _save_png(image, folder / f"{sample.key}.png")

    def read(self, folder: Path, index: int, sample: Sample, count: int) -> list[Image.Image]:
        names = [folder / f"{sample.key}{suffix}" for suffix in IMAGE_SUFFIXES]
        file = next((name for name in names if name.is_file()), None)
        if file is None:
            raise ImageError(f"there is no image {names[0]}.")
        image = open_image(file)
        if count == 1:
            return [image]
        width, height = (side // 2 for side in image.size)
        tiles: list[Image.Image] = []
        for number in range(count):
            left, top = number % 2 * width, number // 2 * height
            tiles.append(image.crop((left, top, left + width, top + height)))
        return tiles


def _save_png(image: Image.Image, path: Path) -> None:
    with writing(path, DataError), atomic_open(path) as file:
        image.save(file, "PNG")


class JudgedDrawings:
    """A benchmark of drawings; subclasses judge them.

    system: draws; None: the images are in `run.judging.image_folder`.
    """

    layout: ClassVar[ImageLayout] = SampleFolders()

    def __init__(
        self, system: MultimodalSystem | None, run: Run, samples: Sequence[Sample]
    ) -> None:
        assert run.judging is not None
        self.run = run
        self.judging: Judging = run.judging
        self.indices = {sample.key: index for index, sample in enumerate(samples)}
        self.drawer = None if system is None else CaptionDrawer(system, run, samples)
        self.folder = self.judging.image_folder or run.out / "images"
        if isinstance(self.layout, GridFiles) and run.best_of > MAX_GRID:
            raise ConfigError(f"A grid holds {MAX_GRID} images at most, not {run.best_of}.")
        self.device: torch.device = choose_device(self.judging.device, log=None).device

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
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

        # 2. What the judge says about them.
        return [
            self.judge(sample, of_prompt)
            for sample, of_prompt in zip(samples, drawings, strict=True)
        ]

    def judge(self, sample: Sample, images: Sequence[Image.Image]) -> Line:
        """The line of a prompt."""
        raise NotImplementedError

    def write_sheet(
        self,
        samples: Sequence[Sample],
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
        _save_png(sheet, self.run.out / "sheet.png")


class GenEval(JudgedDrawings):
    """The task "geneval": a detector finds the objects of prompts, see `evaluation.geneval`."""

    def __init__(
        self, system: MultimodalSystem | None, run: Run, samples: Sequence[ObjectPrompt]
    ) -> None:
        super().__init__(system, run, samples)
        self.detector = load_detector(self.judging.judge, self.device)
        self.limits = _limits(self.judging, self.detector.limits)
        self.colours: ColourClassifier | None = None
        has_colours = any(item.colour for sample in samples for item in sample.include)
        if has_colours and not self.detector.knows_colours:
            clip = find_clip(run.clip, "use a detector that knows colours")
            self.colours = ColourClassifier(clip, self.device)

    def judge(self, sample: Sample, images: Sequence[Image.Image]) -> Line:
        """The detections that count, of each image."""
        assert isinstance(sample, ObjectPrompt)
        threshold = self.limits.threshold
        if sample.tag == COUNTING:
            threshold = self.limits.counting_threshold
        coloured = {item.label for item in sample.include if item.colour}
        found = self.detector.detect(images, [sample.labels] * len(images))
        line: Line = {"caption": sample.caption, "detections": []}
        for image, detections in zip(images, found, strict=True):
            kept = kept_detections(detections, threshold, self.limits.max_overlap)
            if self.colours is not None:
                for position, item in enumerate(kept):
                    if item.label in coloured:
                        kept[position] = self.colours.with_colour(image, item)
            line["detections"].append([item.to_json() for item in kept])
        return line

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """GenEval's results for each image; the mean over kinds of prompts, and each of them."""
        # 1. The verdict of each image; a prompt without images counts as a wrong one.
        results: list[JsonObject] = []
        hits: dict[str, list[bool]] = {}  # of each kind
        prompts: dict[str, list[int]] = {}
        captions: list[list[str]] = []
        n_solved = 0
        for index, (sample, line) in enumerate(zip(samples, lines, strict=True)):
            assert isinstance(sample, ObjectPrompt)
            faults = _line_faults(sample, line)
            hits.setdefault(sample.tag, []).extend(not fault for fault in faults)
            prompts.setdefault(sample.tag, []).extend(index for _ in faults)
            n_solved += "" in faults
            captions.append([fault or "correct" for fault in faults] if "bad" not in line else [])
            for number, fault in enumerate(faults):
                results.append(
                    {
                        "filename": f"{self.indices[sample.key]:05d}/samples/{number:04d}.png",
                        "tag": sample.tag,
                        "prompt": sample.caption,
                        "correct": not fault,
                        "reason": fault,
                        "metadata": json.dumps(sample.metadata),
                    }
                )
        if not results:
            return Scores(results, {})

        # 2. The scores; images of a prompt are resampled together.
        kinds = {tag: bootstrap(hits[tag], prompts[tag]) for tag in hits}
        values = score_values(kinds)
        values["images"] = len(results)
        values["prompts_correct"] = round(n_solved / len(samples), 4)
        self.write_sheet(samples, captions, [sample.answer_type for sample in samples])
        return Scores(results, values)


def _line_faults(sample: ObjectPrompt, line: Line) -> list[str]:
    """The fault of each image of a line, empty where it is correct."""
    if "bad" in line:
        return [line["bad"]]
    faults: list[str] = []
    for rows in line["detections"]:
        detections = [Detection.from_json(row) for row in rows]
        faults.append("\n".join(rule_faults(sample, detections)))
    return faults


def score_values(kinds: Mapping[str, Estimate]) -> JsonObject:
    """The mean over kinds of prompts, and each of them, with intervals."""
    values: JsonObject = {"score": plain(mean_of_means(list(kinds.values())))}
    values["kinds"] = {name: plain(estimate) for name, estimate in kinds.items()}
    return values


def _limits(judging: Judging, defaults: Limits) -> Limits:
    """The limits of a detector; those of the run override its own."""
    chosen = {
        "threshold": judging.threshold,
        "counting_threshold": judging.counting_threshold,
        "max_overlap": judging.max_overlap,
    }
    return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})
