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
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.evaluation.annotations import Json, read_items
from seed_multimodal.evaluation.answers import Judging, Line, Run, Scores
from seed_multimodal.evaluation.detection import (
    ColourClassifier,
    Detection,
    Detector,
    Limits,
    load_detector,
)
from seed_multimodal.evaluation.drawing import find_clip
from seed_multimodal.evaluation.judged import (
    JudgedDrawings,
    JudgedPrompt,
    most_images,
    score_values,
)
from seed_multimodal.evaluation.metrics import bootstrap
from seed_multimodal.pipelines.base import MultimodalSystem

COUNTING = "counting"  # the tag whose detections need the higher confidence
MAX_OBJECTS = 16  # of a class
MARGIN = 0.1  # of both objects' sides, by which centres must differ
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Requirement:
    """Objects of an image; `relation` to the objects of the requirement with index `target`."""

    label: str
    count: int
    colour: str = ""
    relation: str = ""
    target: int = 0


@dataclass
class ObjectPrompt(JudgedPrompt):
    """A line of the benchmark."""

    include: list[Requirement] = field(default_factory=list)
    exclude: list[Requirement] = field(default_factory=list)

    @property
    def tag(self) -> str:
        return self.answer_type

    @property
    def labels(self) -> list[str]:
        """Classes that have to be detected."""
        return list(dict.fromkeys(item.label for item in [*self.include, *self.exclude]))


def read_object_prompts(path: str | Path) -> list[ObjectPrompt]:
    """The prompts of a file in the format of `evaluation_metadata.jsonl`.

    Raises DataError: no such file, or an item of another layout.
    """
    prompts: list[ObjectPrompt] = []
    for index, (location, item) in enumerate(read_items(path, "prompts")):
        prompts.append(_object_prompt(index, location, item))
    return prompts


def _object_prompt(index: int, location: str, item: Json) -> ObjectPrompt:
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise DataError(f"{location}: has no text 'prompt'.")
    if not isinstance(item.get("tag"), str):
        raise DataError(f"{location}: has no 'tag', the kind of prompt.")
    prompt = ObjectPrompt(
        index, location, references=[item["prompt"]], answer_type=item["tag"], metadata=item
    )
    for name in ("include", "exclude"):
        requirements = item.get(name, [])
        if not isinstance(requirements, list):
            raise DataError(f"{location}: {name!r} is no list of objects.")
        for position, requirement in enumerate(requirements):
            getattr(prompt, name).append(_requirement(location, requirement, position))
    return prompt


def _requirement(location: str, item: Json, n_before: int) -> Requirement:
    """An object of a prompt; `n_before`: objects of the list before it."""
    if not isinstance(item, dict) or not isinstance(item.get("class"), str):
        raise DataError(f"{location}: an object has no 'class'.")
    label = item["class"]
    count = item.get("count")
    if not isinstance(count, int) or count < 1:
        raise DataError(f"{location}: the count of {label!r} is no positive number.")

    # GenEval writes [relation, index].
    relation = ""
    target = 0
    if "position" in item:
        try:
            relation, target = item["position"]
        except (TypeError, ValueError):
            raise DataError(f"{location}: the position of {label!r} is no pair.") from None
        if relation not in RELATIONS or target not in range(n_before):
            raise DataError(
                f"{location}: the position of {label!r} is no relation ({', '.join(RELATIONS)}) to "
                "an earlier object."
            )
    return Requirement(label, count, str(item.get("color", "")), relation, target)


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
    for requirement in prompt.include:
        group = by_label.get(requirement.label, [])[: requirement.count]
        fault = _group_fault(requirement, group, groups)
        if fault:
            faults.append(fault)
        groups.append(None if fault else group)

    # 2. What must not be there.
    for requirement in prompt.exclude:
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
    if not requirement.relation:
        return ""
    targets = earlier[requirement.target]
    if targets is None:
        return f"no target for {label} to be {requirement.relation}"
    for item in group:
        for target in targets:
            relations = spatial_relations(item, target)
            if requirement.relation not in relations:
                actual = " and ".join(sorted(relations)) or "no relation to"
                return f"expected {label} {requirement.relation} target, found {actual} target"
    return ""


def spatial_relations(item: Detection, target: Detection) -> set[str]:
    """Relations of an object to another, of `RELATIONS`.

    The offset of the centres is reduced by `MARGIN` of both sizes; each component of what is left
    counts if it is more than half of the whole offset's length.
    """
    reduced: list[float] = []
    offsets: list[float] = []
    for axis in (0, 1):
        start, end = item.box[axis], item.box[axis + 2]
        target_start, target_end = target.box[axis], target.box[axis + 2]
        offset = (start + end - target_start - target_end) / 2
        margin = MARGIN * (abs(end - start) + abs(target_end - target_start))
        offsets.append(offset)
        reduced.append(math.copysign(max(abs(offset) - margin, 0.0), offset))
    length = math.hypot(*offsets)
    if max(map(abs, reduced)) < 1e-3:
        return set()

    right, down = (component / length for component in reduced)
    relations: set[str] = set()
    if abs(right) > 0.5:
        relations.add("right of" if right > 0 else "left of")
    if abs(down) > 0.5:
        relations.add("below" if down > 0 else "above")
    return relations


def _overlap(first: Detection, second: Detection) -> float:
    """Intersection over union of two boxes, of pixels as in GenEval's program."""
    left, top = map(max, zip(first.box[:2], second.box[:2], strict=True))
    right, bottom = map(min, zip(first.box[2:], second.box[2:], strict=True))
    intersection = _area((left, top, right, bottom))
    union = _area(first.box) + _area(second.box) - intersection
    return intersection / union


def _area(box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    return max(right - left + 1, 0) * max(bottom - top + 1, 0)


# ---- evaluation


class GenEval(JudgedDrawings):
    """The task "geneval": a detector finds the objects of prompts."""

    def __init__(
        self, system: MultimodalSystem | None, run: Run, samples: Sequence[ObjectPrompt]
    ) -> None:
        super().__init__(system, run, samples)
        self.detector = load_detector(self.judging.model, self.device)
        check_labels(self.detector, samples)
        self.limits = _limits(self.judging, self.detector.limits)
        self.colours: ColourClassifier | None = None
        has_colours = any(item.colour for sample in samples for item in sample.include)
        if has_colours and not self.detector.knows_colours:
            clip = find_clip(
                run.clip, "to name the colours of objects", "use a detector that knows colours"
            )
            self.colours = ColourClassifier(clip, self.device)

    def line_of(self, sample: JudgedPrompt, images: Sequence[Image.Image]) -> Line:
        """The detections that count, of each image."""
        assert isinstance(sample, ObjectPrompt)
        threshold = self.limits.threshold
        if sample.tag == COUNTING:
            threshold = self.limits.counting_threshold
        coloured = {item.label for item in sample.include if item.colour}
        detections_by_image = self.detector.detect(images, [sample.labels] * len(images))
        line: Line = {"caption": sample.caption, "detections": []}
        for image, detections in zip(images, detections_by_image, strict=True):
            kept = kept_detections(detections, threshold, self.limits.max_overlap)
            if self.colours is not None:
                for position, item in enumerate(kept):
                    if item.label in coloured:
                        kept[position] = self.colours.with_colour(image, item)
            line["detections"].append([item.to_json() for item in kept])
        return line

    def score(self, samples: Sequence[ObjectPrompt], lines: Sequence[Line]) -> Scores:
        """GenEval's results for each image; the mean over kinds of prompts, and each of them."""
        # 1. The verdict of each image; a prompt without images counts as a wrong one.
        results: list[JsonObject] = []
        hits: dict[str, list[bool]] = {}  # of each kind
        prompts: dict[str, list[int]] = {}
        captions: list[list[str]] = []
        n_solved = 0
        n_images = most_images(line["detections"] for line in lines if "detections" in line)
        for index, (sample, line) in enumerate(zip(samples, lines, strict=True)):
            faults = _line_faults(sample, line, n_images)
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


def check_labels(detector: Detector, prompts: Sequence[ObjectPrompt]) -> None:
    """Raise ConfigError: the detector does not know all classes of the prompts."""
    if detector.labels is None:
        return
    needed = {label for prompt in prompts for label in prompt.labels}
    unknown = sorted(needed - detector.labels)
    if unknown:
        raise ConfigError(
            f"The detector has no class for {', '.join(unknown)}, of which the prompts ask; use a "
            "zero-shot detector (OWLv2)."
        )


def _line_faults(sample: ObjectPrompt, line: Line, n_images: int) -> list[str]:
    """The fault of each image of a line, empty where it is correct; `n_images`: if it has none."""
    if "bad" in line:
        return [line["bad"]] * n_images
    faults: list[str] = []
    for rows in line["detections"]:
        detections = [Detection.from_json(row) for row in rows]
        faults.append("\n".join(rule_faults(sample, detections)))
    return faults


def _limits(judging: Judging, defaults: Limits) -> Limits:
    """The limits of a detector; those of the run override its own."""
    chosen = {
        "threshold": judging.threshold,
        "counting_threshold": judging.counting_threshold,
        "max_overlap": judging.max_overlap,
    }
    return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})
