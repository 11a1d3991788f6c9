"""Object detectors for benchmarks of drawings: any detector of transformers, or a registered one.

    detector = load_detector("owlv2-base-patch16-ensemble", device)
    detector.detect(images, [["dog", "traffic light"], ["cat"]])

A folder of transformers is a zero-shot detector (OWLv2, Grounding DINO), an instance segmentation
(Mask2Former, whose masks the colours are read in) or a detector of fixed classes (DETR). Other
packages register theirs by an entry point of the group `seed_multimodal.detectors`, a function of
a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.evaluation.drawing import ClipScores
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import nearest

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
# COCO's names of objects that benchmarks call otherwise.
COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
LOWEST_SCORE = 0.05  # of detections that are recorded
# Of GenEval: what the colour classifier distinguishes, and how it writes them.
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
BACKGROUND = "#999"  # around an object whose mask is known


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    colour: empty if the detector does not know it. mask: its pixels [H, W]; None: the whole box.
    """

    label: str
    score: float
    box: Box
    colour: str = ""
    mask: NDArray[np.bool_] | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields without the mask, numbers rounded."""
        fields: dict[str, Any] = {"label": self.label, "score": round(self.score, 4)}
        fields["box"] = [round(edge, 1) for edge in self.box]
        if self.colour:
            fields["colour"] = self.colour
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Detection:
        left, top, right, bottom = fields["box"]
        box = (left, top, right, bottom)
        return cls(fields["label"], fields["score"], box, fields.get("colour", ""))


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

    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Objects in each image; `labels`: the classes that are searched for in it."""
        ...


def load_detector(name: str | Path, device: torch.device) -> Detector:
    """A registered detector, or that of a folder of transformers.

    Raises CheckpointError: no such folder, or no detector in it.
    """
    entries = registered("detectors")
    if str(name) in entries:
        open_detector: Callable[[torch.device], Detector] = import_entry(entries[str(name)])
        return open_detector(device)
    if not (Path(name) / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no folder of a detector (config.json){nearest(str(name), entries)}."
        )
    return HubDetector(Path(name), device)


class HubDetector:
    """A detector of transformers, in fp32."""

    knows_colours = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        import transformers

        # 1. The kind of detector, by its architecture.
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: no detector ({first_line(error)}).") from error
        kinds = {
            "zero-shot": transformers.AutoModelForZeroShotObjectDetection,
            "masks": transformers.AutoModelForUniversalSegmentation,
            "boxes": transformers.AutoModelForObjectDetection,
        }
        matches = [kind for kind, auto in kinds.items() if type(config) in auto._model_mapping]
        if not matches:
            names = "zero-shot object detection, universal segmentation, object detection"
            raise CheckpointError(f"{folder}: {config.model_type} is no model for {names}.")
        self.kind = matches[0]
        self.limits = ZERO_SHOT_LIMITS if self.kind == "zero-shot" else GENEVAL_LIMITS

        # 2. The model, and its preprocessing.
        model_class: Any = kinds[self.kind]
        processor_class: Any = transformers.AutoImageProcessor
        if self.kind == "zero-shot":
            processor_class = transformers.AutoProcessor
        try:
            self.processor = processor_class.from_pretrained(folder, local_files_only=True)
            model = model_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no detector ({first_line(error)}).") from error
        self.model = model.to(device).eval()
        self.device = device
        self.names: dict[int, str] = config.id2label

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Objects in each image, of its labels; images one by one, since their labels differ."""
        detections: list[list[Detection]] = []
        for image, image_labels in zip(images, labels, strict=True):
            rgb = image.convert("RGB")
            if self.kind == "zero-shot":
                detections.append(self._zero_shot(rgb, image_labels))
            else:
                objects = self._masks(rgb) if self.kind == "masks" else self._boxes(rgb)
                detections.append([item for item in objects if item.label in image_labels])
        return detections

    def _zero_shot(self, image: Image.Image, labels: Sequence[str]) -> list[Detection]:
        """Objects that a text describes."""
        # OWL's texts are those of CLIP. Grounding DINO finds parts of one text: a label at a time.
        if self.model.config.model_type.startswith("owl"):
            return self._described(image, {f"a photo of a {label}": label for label in labels})
        detections: list[Detection] = []
        for label in labels:
            detections += self._described(image, {f"a {label}": label})
        return detections

    def _described(self, image: Image.Image, labels: Mapping[str, str]) -> list[Detection]:
        """Objects that one of several texts describes; `labels`: text → label."""
        texts = list(labels)
        inputs = self.processor(images=image, text=[texts], return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        post_process = self.processor.post_process_grounded_object_detection
        options: dict[str, Any] = {}
        if "input_ids" in inspect.signature(post_process).parameters:
            options["input_ids"] = inputs.input_ids
        [result] = post_process(
            outputs,
            threshold=LOWEST_SCORE,
            target_sizes=[image.size[::-1]],
            text_labels=[texts],
            **options,
        )
        names = [labels[texts[0]]] * len(result["scores"])
        if len(texts) > 1:
            names = [labels[text] for text in result["text_labels"]]
        return _detections(names, result["scores"], result["boxes"])

    def _boxes(self, image: Image.Image) -> list[Detection]:
        """Objects of a detector with fixed classes."""
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        [result] = self.processor.post_process_object_detection(
            outputs, threshold=LOWEST_SCORE, target_sizes=[image.size[::-1]]
        )
        names = [self._label(int(index)) for index in result["labels"]]
        return _detections(names, result["scores"], result["boxes"])

    def _masks(self, image: Image.Image) -> list[Detection]:
        """Objects of an instance segmentation."""
        # 1. The instances.
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        [result] = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=LOWEST_SCORE,
            target_sizes=[image.size[::-1]],
            return_binary_maps=True,
        )

        # 2. Their boxes are those of their masks.
        detections: list[Detection] = []
        for segment, pixels in zip(result["segments_info"], result["segmentation"], strict=True):
            mask = pixels.bool().cpu().numpy()
            if not mask.any():
                continue
            rows = np.flatnonzero(mask.any(axis=1))
            columns = np.flatnonzero(mask.any(axis=0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1]))
            label = self._label(segment["label_id"])
            detections.append(Detection(label, float(segment["score"]), box, mask=mask))
        return detections

    def _label(self, index: int) -> str:
        name = self.names[index]
        return COCO_NAMES.get(name, name)


def _detections(names: Sequence[str], scores: Tensor, boxes: Tensor) -> list[Detection]:
    """Detections of names with scores [N] and boxes [N, 4]."""
    detections: list[Detection] = []
    for name, score, edges in zip(names, scores.tolist(), boxes.tolist(), strict=True):
        left, top, right, bottom = edges
        detections.append(Detection(name, score, (left, top, right, bottom)))
    return detections


class ColourClassifier:
    """The colour of an object, by CLIP's texts about its crop (GenEval)."""

    def __init__(self, clip: Path, device: torch.device) -> None:
        self.clip = ClipScores(clip, device)
        self._texts: dict[str, Tensor] = {}

    def with_colour(self, image: Image.Image, item: Detection) -> Detection:
        """A detection with its colour."""
        crop = _crop(image.convert("RGB"), item)
        features = F.normalize(self.clip.images.embed([crop]), dim=-1)  # [1, E]
        scores = features @ self._colour_features(item.label).T  # [1, colours]
        return replace(item, colour=COLOURS[int(scores.argmax())])

    def _colour_features(self, label: str) -> Tensor:
        """Features [colours, E] of an object in each colour, the mean of all texts."""
        if label not in self._texts:
            rows: list[Tensor] = []
            for colour in COLOURS:
                texts = [text.format(colour, label) for text in COLOUR_TEXTS]
                rows.append(F.normalize(self.clip.texts(texts).mean(0), dim=0))
            self._texts[label] = torch.stack(rows)
        return self._texts[label]


def _crop(image: Image.Image, item: Detection) -> Image.Image:
    """The box of an object; what is around its mask is grey."""
    if item.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(item.mask))
    # Boxes of floats may be empty.
    left, top, right, bottom = map(round, item.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
