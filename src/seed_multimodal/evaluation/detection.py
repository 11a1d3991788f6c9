"""Object detectors for benchmarks of drawings: any detector of transformers, or a registered one.

    detector = load_detector("owlv2-base-patch16-ensemble", device)
    detector.detect(images, [["dog", "traffic light"], ["cat"]])

A folder of transformers runs in the pipeline of its task: a zero-shot detector (OWLv2, Grounding
DINO), a detector of fixed classes (DETR) or an instance segmentation (Mask2Former, whose masks the
colours are read in). Other packages register theirs by an entry point of the group
`seed_multimodal.detectors`, a function of a device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ImageSegmentationPipeline, pipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
)

from seed_multimodal.config import read_table
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.evaluation.clip import Clip
from seed_multimodal.evaluation.metrics import finite
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import nearest

Box = Sequence[float]  # left, top, right, bottom in pixels
_TABLES = read_table(__file__)
# COCO's names of objects that GenEval calls otherwise.
COCO_NAMES: dict[str, str] = _TABLES["coco_names"]
LOWEST_SCORE = 0.05  # of what a detector returns
# Task of transformers' pipelines → the types of its models, and its outputs without scores.
TASKS = {
    "zero-shot-object-detection": MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
    "object-detection": MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "image-segmentation": MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
}
# Of GenEval: what the colour classifier distinguishes, and how it writes them.
COLOURS: list[str] = _TABLES["colours"]
COLOUR_TEXTS: list[str] = _TABLES["colour_texts"]
BACKGROUND = "#999"  # around an object whose mask is known


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    colour: empty if the detector does not know it. mask: its pixels; None: the whole box.
    """

    label: str
    score: float
    box: Box
    colour: str = ""
    mask: Image.Image | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields but the mask, numbers rounded."""
        fields: dict[str, Any] = {"label": self.label, "score": round(self.score, 4)}
        fields["box"] = [round(edge, 1) for edge in self.box]
        if self.colour:
            fields["colour"] = self.colour
        return fields


@dataclass(frozen=True)
class Limits:
    """Which detections count: scores, and overlap with a better one (1: any)."""

    threshold: float
    counting_threshold: float
    max_overlap: float = 1.0


# Of GenEval's program, fitted to Mask2Former.
GENEVAL_LIMITS = Limits(0.3, 0.9)
# Zero-shot detectors are less confident, and find an object several times.
ZERO_SHOT_LIMITS = Limits(0.3, 0.3, max_overlap=0.5)


class Detector(Protocol):
    """Finds objects.

    limits: the default ones. knows_colours: whether its detections have colours.
    """

    limits: Limits
    knows_colours: bool

    @property
    def labels(self) -> frozenset[str] | None:
        """The classes that it can find; None: any."""

    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Objects in each image; `labels`: the classes that are searched for in it."""
        ...


def load_detector(name: str, device: torch.device) -> Detector:
    """A registered detector, or that of a folder of transformers.

    Raises CheckpointError: no such folder, or no detector in it.
    """
    entries = registered("detectors")
    if name in entries:
        return import_entry(entries[name])(device)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no folder of a detector (config.json){nearest(name, entries)}."
        )
    return HubDetector(folder, device)


class HubDetector:
    """A detector of transformers, in fp32."""

    knows_colours = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        model_type = str(read_json_object(folder / "config.json").get("model_type"))
        tasks = [task for task, names in TASKS.items() if model_type in names]
        if not tasks:
            raise CheckpointError(f"{folder}: {model_type} is no model for {', '.join(TASKS)}.")
        is_segmentation = tasks[0] == "image-segmentation"
        self.is_zero_shot = tasks[0] == "zero-shot-object-detection"
        self.limits = ZERO_SHOT_LIMITS if self.is_zero_shot else GENEVAL_LIMITS
        try:
            self.pipeline: Any = pipeline(
                tasks[0],
                str(folder),
                device=device,
                dtype=torch.float32,
                pipeline_class=InstanceSegmentation if is_segmentation else None,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no detector ({first_line(error)}).") from error

        # A model that computes NaN finds nothing, which is no score.
        def check(module: object, inputs: object, outputs: Any) -> None:
            boxes = outputs.get("pred_boxes", outputs.get("masks_queries_logits"))
            finite(boxes.cpu(), str(folder))

        self.pipeline.model.register_forward_hook(check)
        # OWL's texts are those of CLIP, Grounding DINO's end with a full stop.
        self.template = "a photo of a {}" if model_type.startswith("owl") else "a {}."

    @property
    def labels(self) -> frozenset[str] | None:
        if self.is_zero_shot:
            return None
        names = self.pipeline.model.config.id2label.values()
        return frozenset(COCO_NAMES.get(name, name) for name in names)

    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Objects in each image, of its labels; images one by one, since their labels differ."""
        detections: list[list[Detection]] = []
        for image, image_labels in zip(images, labels, strict=True):
            # 1. What the model finds; a zero-shot detector is asked for each label.
            inputs: dict[str, Any] = {"inputs": image.convert("RGB")}
            names = COCO_NAMES
            if self.is_zero_shot:
                names = {self.template.format(label): label for label in image_labels}
                inputs = {"image": image.convert("RGB"), "candidate_labels": list(names)}
            objects = self.pipeline(**inputs, threshold=LOWEST_SCORE)

            # 2. Its labels in GenEval's words.
            detections.append([])
            for item in objects:
                label = names.get(item["label"], item["label"])
                if label in image_labels:
                    box = list(map(float, item["box"].values()))
                    found = Detection(label, item["score"], box, mask=item.get("mask"))
                    detections[-1].append(found)
        return detections


class InstanceSegmentation(ImageSegmentationPipeline):  # type: ignore[misc]
    """Instances with masks that may overlap, and the boxes around them (Mask2Former)."""

    def postprocess(self, model_outputs: Any, threshold: float) -> list[dict[str, Any]]:
        [result] = self.image_processor.post_process_instance_segmentation(
            model_outputs,
            threshold=threshold,
            target_sizes=model_outputs["target_size"],
            return_binary_maps=True,
        )
        instances: list[dict[str, Any]] = []
        # Without segments the result has no masks.
        for segment, pixels in zip(result["segments_info"], result["segmentation"], strict=False):
            mask = Image.fromarray(pixels.bool().cpu().numpy())
            edges = mask.getbbox()
            if edges is not None:
                label = self.model.config.id2label[segment["label_id"]]
                box = dict(enumerate(edges))
                instances.append(
                    {"label": label, "score": segment["score"], "box": box, "mask": mask}
                )
        return instances


class ColourClassifier:
    """The colour of an object, by CLIP's texts about its crop (GenEval)."""

    def __init__(self, clip: Path, device: torch.device) -> None:
        self.clip = Clip(clip, device, keep_ratio=True)
        self.colour_features = functools.cache(self._colour_features)

    def with_colour(self, image: Image.Image, item: Detection) -> Detection:
        """A detection with its colour."""
        crop = _crop(image.convert("RGB"), item)
        scores = self.clip.images([crop]) @ self.colour_features(item.label).T  # [1, colours]
        return replace(item, colour=COLOURS[int(scores.argmax())])

    def _colour_features(self, label: str) -> Tensor:
        """Features [colours, E] of an object in each colour, the mean of all texts."""
        rows: list[Tensor] = []
        for colour in COLOURS:
            texts = [text.format(colour, label) for text in COLOUR_TEXTS]
            rows.append(F.normalize(self.clip.texts(texts).mean(0), dim=0))
        return torch.stack(rows)


def _crop(image: Image.Image, item: Detection) -> Image.Image:
    """The box of an object; what is around its mask is grey."""
    if item.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, item.mask)
    # Boxes of floats may be empty.
    left, top, right, bottom = map(round, item.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
