"""GenEval: are the objects of a prompt in its images (Ghosh et al. 2023, arXiv:2310.11513)?

    prompts = read_object_prompts("evaluation_metadata.jsonl")
    faults = rule_faults(prompts[0], detections)    # [] if the image is correct

A prompt lists objects that an image must show ("include": class, count, colour, position to an
earlier object) and must not show ("exclude": fewer than `count`). The rules are those of the
paper's program: the most confident detections of a class count, all of them must have the colour,
and each must stand in the relation to each target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.evaluation.annotations import parse_item, read_items
from seed_multimodal.evaluation.benchmark import Line, Scores
from seed_multimodal.evaluation.judged import JudgedDrawings, JudgedPrompt, estimate
from seed_multimodal.evaluation.metrics import grouped, mean_of_means
from seed_multimodal.evaluation.text2image import find_clip
from seed_multimodal.settings import fraction, setting

if TYPE_CHECKING:
    from seed_multimodal.evaluation.detection import ColourClassifier, Detection, Detector, Limits

COUNTING = "counting"  # the tag whose detections need the higher confidence
MAX_OBJECTS = 16  # of a class
MARGIN = 0.1  # of both objects' sides, by which centres must differ


class Requirement(BaseModel):
    """Objects of an image; `position`: relation to the objects of an earlier requirement."""

    label: str = Field(alias="class")
    count: int = Field(strict=True, ge=1)
    colour: str = Field("", alias="color")
    position: tuple[Literal["left of", "right of", "above", "below"], int] | None = None


class Item(BaseModel):
    """A line of the file."""

    tag: str
    prompt: str
    include: list[Requirement] = []
    exclude: list[Requirement] = []


@dataclass(kw_only=True)
class ObjectPrompt(JudgedPrompt):
    """A prompt with its objects."""

    item: Item

    @property
    def labels(self) -> list[str]:
        """Classes that have to be detected."""
        objects = [*self.item.include, *self.item.exclude]
        return list(dict.fromkeys(requirement.label for requirement in objects))


def read_object_prompts(path: str | Path) -> list[ObjectPrompt]:
    """The prompts of a file in the format of `evaluation_metadata.jsonl`.

    Raises DataError: no such file, or an item of another layout.
    """
    items = enumerate(read_items(path))
    return [object_prompt(index, location, metadata) for index, (location, metadata) in items]


def object_prompt(index: int, location: str, metadata: JsonObject) -> ObjectPrompt:
    """The prompt of a line. Raises DataError: another layout."""
    item = parse_item(Item, location, metadata)
    for n_before, requirement in enumerate(item.include):
        if requirement.position and requirement.position[1] not in range(n_before):
            raise DataError(
                f"{location}: the position of {requirement.label!r} is to no earlier object."
            )
    prompt = ObjectPrompt(index, location, references=[item.prompt], item=item)
    prompt.metadata = metadata
    prompt.group = item.tag
    return prompt


# ---- rules


def kept_detections(
    detections: Sequence[Detection], threshold: float, max_overlap: float = 1.0
) -> list[Detection]:
    """The detections that count: above the threshold, best first, at most 16 of a class.

    max_overlap: intersection over union with a better one of its class; 1 keeps all.
    """
    kept: list[Detection] = []
    n_seen: dict[str, int] = {}
    for detection in sorted(detections, key=lambda item: -item.score):
        label = detection.label
        if detection.score <= threshold or n_seen.get(label, 0) >= MAX_OBJECTS:
            continue
        n_seen[label] = n_seen.get(label, 0) + 1
        better = [other for other in kept if other.label == label]
        if max_overlap < 1 and any(_overlap(detection, other) >= max_overlap for other in better):
            continue
        kept.append(detection)
    return kept


def counted_detections(
    prompt: ObjectPrompt, detections: Sequence[Detection], limits: Limits
) -> list[Detection]:
    """The detections that count for a prompt, by the limits of a detector or a run."""
    is_counting = prompt.item.tag == COUNTING
    threshold = limits.counting_threshold if is_counting else limits.threshold
    return kept_detections(detections, threshold, limits.max_overlap)


def check_classes(detector: Detector, prompts: Sequence[ObjectPrompt]) -> None:
    """Raise ConfigError for classes that a detector does not know; None of its labels: it knows
    all."""
    if detector.labels is None:
        return
    needed = {label for prompt in prompts for label in prompt.labels}
    unknown = sorted(needed - detector.labels)
    if unknown:
        raise ConfigError(
            f"The detector has no class for {', '.join(unknown)}, of which the prompts "
            "ask; use a zero-shot detector (OWLv2)."
        )


def rule_faults(prompt: ObjectPrompt, detections: Sequence[Detection]) -> list[str]:
    """Why an image does not show its prompt; empty if it does.

    detections: of `kept_detections`, with colours where the prompt has some.
    """
    by_label: dict[str, list[Detection]] = {}
    for detection in detections:
        by_label.setdefault(detection.label, []).append(detection)

    # 1. What must be there; objects of a failed requirement cannot be a target.
    faults: list[str] = []
    groups: list[list[Detection] | None] = []
    for requirement in prompt.item.include:
        group = by_label.get(requirement.label, [])[: requirement.count]
        fault = _group_fault(requirement, group, groups)
        if fault:
            faults.append(fault)
        groups.append(None if fault else group)

    # 2. What must not be there.
    for requirement in prompt.item.exclude:
        n_objects = len(by_label.get(requirement.label, []))
        if n_objects >= requirement.count:
            faults.append(f"expected {requirement.label}<{requirement.count}, found {n_objects}")
    return faults


def _group_fault(
    requirement: Requirement,
    group: Sequence[Detection],
    earlier: Sequence[Sequence[Detection] | None],
) -> str:
    """The fault of the objects of a requirement; empty if they satisfy it."""
    # 1. Number and colour.
    label = requirement.label
    count = requirement.count
    if len(group) < count:
        return f"expected {label}>={count}, found {len(group)}"
    colours = [item.colour for item in group]
    if requirement.colour and colours.count(requirement.colour) < count:
        return f"expected {requirement.colour} {label}>={count}, found {', '.join(colours)}"

    # 2. Position: each object to each object of the target.
    if requirement.position is None:
        return ""
    relation, index = requirement.position
    targets = earlier[index]
    if targets is None:
        return f"no target for {label} to be {relation}"
    for item in group:
        for target in targets:
            relations = spatial_relations(item, target)
            if relation not in relations:
                actual = " and ".join(sorted(relations)) or "no relation to"
                return f"expected {label} {relation} target, found {actual} target"
    return ""


def spatial_relations(item: Detection, target: Detection) -> set[str]:
    """Relations of an object to another.

    The offset of the centres is reduced by `MARGIN` of both sizes; each component of what is left
    counts if it is more than half of the whole offset's length.
    """
    corners = np.reshape([item.box, target.box], (2, 2, 2))  # box, corner, axis
    offset = corners[0].mean(0) - corners[1].mean(0)
    sides = np.abs(corners[:, 1] - corners[:, 0])
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * sides.sum(0), 0)
    if np.abs(reduced).max() < 1e-3:
        return set()

    right, down = reduced / np.linalg.norm(offset)
    relations: set[str] = set()
    if abs(right) > 0.5:
        relations.add("right of" if right > 0 else "left of")
    if abs(down) > 0.5:
        relations.add("below" if down > 0 else "above")
    return relations


def _overlap(first: Detection, second: Detection) -> float:
    """Intersection over union of two boxes, of pixels as in GenEval's program."""
    import torch
    from torchvision.ops import box_iou

    edges = torch.tensor([first.box, second.box], dtype=torch.float64)
    boxes = edges + torch.tensor([0, 0, 1, 1])
    return float(box_iou(boxes[:1], boxes[1:]))


# ---- evaluation


@dataclass(kw_only=True)
class GenEval(JudgedDrawings[ObjectPrompt]):
    """A detector finds the objects of prompts; limits of detections are by default its own."""

    title = "objects of prompts in drawings, by a detector"
    kind = "geneval"
    file_name = "evaluation_metadata.jsonl"
    images_per_prompt = 4
    verdicts = "detections"

    judge: Path = setting(
        metavar="MODEL",
        help="folder of a detector of transformers (OWLv2, Mask2Former, DETR …), or nano",
    )
    clip: Path | None = setting(None, metavar="DIR", help="CLIP that names the colours of objects")
    threshold: float | None = fraction(None, help="score of detections that count")
    counting_threshold: float | None = fraction(None, help="of prompts that count objects")
    max_overlap: float | None = fraction(None, help="of detections of a class (1: any)")

    def samples(self) -> list[ObjectPrompt]:
        return read_object_prompts(self.file)

    def prepare(self, samples: Sequence[ObjectPrompt]) -> None:
        from seed_multimodal.evaluation.detection import ColourClassifier, load_detector

        # 1. The detector, which must know all classes; the limits of the run override its own.
        super().prepare(samples)
        device = self.judge_device
        self.detector = load_detector(str(self.judge), device)
        check_classes(self.detector, samples)
        self.limits = self.detector.limits
        for limit in fields(self.limits):
            value = getattr(self, limit.name)
            if value is not None:
                self.limits = replace(self.limits, **{limit.name: value})

        # 2. What names colours.
        self.colours: ColourClassifier | None = None
        has_colours = any(item.colour for sample in samples for item in sample.item.include)
        if has_colours and not self.detector.knows_colours:
            advice = "use a detector that knows colours"
            clip = find_clip(self.clip, "to name the colours of objects", advice)
            self.colours = ColourClassifier(clip, device)

    def judged(self, sample: ObjectPrompt, images: Sequence[Image.Image]) -> list[list[JsonObject]]:
        """The detections that count, of each image."""
        coloured = {item.label for item in sample.item.include if item.colour}
        verdicts: list[list[JsonObject]] = []
        found = self.detector.detect(images, [sample.labels] * len(images))
        for image, detections in zip(images, found, strict=True):
            verdict: list[JsonObject] = []
            for item in counted_detections(sample, detections, self.limits):
                if self.colours is not None and item.label in coloured:
                    item = self.colours.with_colour(image, item)
                verdict.append(item.to_json())
            verdicts.append(verdict)
        return verdicts

    def score(self, samples: Sequence[ObjectPrompt], lines: Sequence[Line]) -> Scores:
        """GenEval's results for each image; the mean over kinds of prompts, and each of them."""
        from seed_multimodal.evaluation.detection import Detection

        # 1. The verdict of each image.
        results: list[JsonObject] = []
        images = self.judged_images(samples, lines)
        for image in images:
            fault = image.fault
            if not fault:
                detections = [Detection(**row) for row in image.verdict]
                fault = "\n".join(rule_faults(image.sample, detections))
            image.score = float(not fault)
            image.caption = fault or "correct"
            results.append(
                {
                    "filename": f"{image.sample.index:05d}/samples/{image.number:04d}.png",
                    "tag": image.sample.group,
                    "prompt": image.sample.caption,
                    "correct": not fault,
                    "reason": fault,
                    "metadata": json.dumps(image.sample.metadata),
                }
            )
        self.write_sheet(images)

        # 2. The scores; a prompt counts as correct if one of its images is.
        kinds = {
            tag: estimate(of_tag, [image.score for image in of_tag])
            for tag, of_tag in grouped(images, [row["tag"] for row in results]).items()
        }
        solved = {image.sample.index for image in images if image.score}
        values = {
            "score": mean_of_means(list(kinds.values())),
            "kinds": kinds,
            "images": len(results),
            "prompts_correct": round(len(solved) / len(samples), 4),
        }
        return Scores(results, values)
