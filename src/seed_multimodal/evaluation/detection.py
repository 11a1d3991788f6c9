"""Object detectors for benchmarks of drawings: any detector of transformers, or a registered one.

    detector = load_detector("owlv2-base-patch16-ensemble", device)
    detector.detect(images, [["dog", "traffic light"], ["cat"]])

A folder of transformers is a zero-shot detector (OWLv2, Grounding DINO), a detector of fixed
classes (DETR) or an instance segmentation (Mask2Former, whose masks the colours are read in).
Other packages register theirs by an entry point of the group `seed_multimodal.detectors`, a
function of a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

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
# COCO's names of objects that GenEval calls otherwise.
COCO_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Mask2Former's, RT-DETR's and D-FINE's names.
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
LOWEST_SCORE = 0.05  # of what a detector returns
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

    @property
    def labels(self) -> frozenset[str] | None:
        """The classes that it can find; None: any."""

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
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: no folder of a detector (config.json){nearest(str(name), entries)}."
        )
    return detector_class(folder)(folder, device)


def detector_class(folder: Path) -> type[HubDetector]:
    """The kind of a folder's detector. Raises CheckpointError: none."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no detector ({first_line(error)}).") from error
    for kind in (ZeroShotDetector, BoxDetector, MaskDetector):
        models = getattr(transformers, kind.auto_model)._model_mapping
        if type(config) in models:
            return kind
    names = "zero-shot object detection, object detection, instance segmentation"
    raise CheckpointError(f"{folder}: {config.model_type} is no model for {names}.")


class HubDetector:
    """A detector of transformers, in fp32.

    auto_model, auto_processor: its classes in transformers.
    """

    auto_model: ClassVar[str]
    auto_processor: ClassVar[str] = "AutoImageProcessor"
    limits = GENEVAL_LIMITS
    knows_colours = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        import transformers

        try:
            self.processor: Any = getattr(transformers, self.auto_processor).from_pretrained(
                folder, local_files_only=True
            )
            model: Any = getattr(transformers, self.auto_model).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no detector ({first_line(error)}).") from error
        self.model = model.to(device).eval()
        self.device = device
        names: dict[int, str] = model.config.id2label
        self.names = {index: COCO_NAMES.get(name, name) for index, name in names.items()}

    @property
    def labels(self) -> frozenset[str] | None:
        return frozenset(self.names.values())

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """Objects in each image, of its labels; images one by one, since their labels differ."""
        detections: list[list[Detection]] = []
        for image, image_labels in zip(images, labels, strict=True):
            objects = self.objects(image.convert("RGB"), image_labels)
            detections.append([item for item in objects if item.label in image_labels])
        return detections

    def objects(self, image: Image.Image, labels: Sequence[str]) -> list[Detection]:
        """Objects in an image; `labels`: those that are searched for."""
        raise NotImplementedError


class ZeroShotDetector(HubDetector):
    """Objects that a text describes (OWLv2, Grounding DINO)."""

    auto_model = "AutoModelForZeroShotObjectDetection"
    auto_processor = "AutoProcessor"
    limits = ZERO_SHOT_LIMITS

    @property
    def labels(self) -> None:
        return None

    def objects(self, image: Image.Image, labels: Sequence[str]) -> list[Detection]:
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


class BoxDetector(HubDetector):
    """Objects of fixed classes (DETR, RT-DETR, YOLOS)."""

    auto_model = "AutoModelForObjectDetection"

    def objects(self, image: Image.Image, labels: Sequence[str]) -> list[Detection]:
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        [result] = self.processor.post_process_object_detection(
            outputs, threshold=LOWEST_SCORE, target_sizes=[image.size[::-1]]
        )
        names = [self.names[index] for index in result["labels"].tolist()]
        return _detections(names, result["scores"], result["boxes"])


class MaskDetector(HubDetector):
    """Instances of fixed classes with their masks (Mask2Former)."""

    auto_model = "AutoModelForUniversalSegmentation"

    def objects(self, image: Image.Image, labels: Sequence[str]) -> list[Detection]:
        # 1. The instances.
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        [result] = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=LOWEST_SCORE,
            target_sizes=[image.size[::-1]],
            return_binary_maps=True,
        )
        segments = result["segments_info"]
        if not segments:
            return []  # the result has no masks then

        # 2. Their boxes are those of their masks.
        detections: list[Detection] = []
        for segment, pixels in zip(segments, result["segmentation"], strict=True):
            mask = pixels.bool().cpu().numpy()
            if not mask.any():
                continue
            rows = np.flatnonzero(mask.any(axis=1))
            columns = np.flatnonzero(mask.any(axis=0))
            left, top = float(columns[0]), float(rows[0])
            right, bottom = float(columns[-1] + 1), float(rows[-1] + 1)
            label = self.names[segment["label_id"]]
            box = (left, top, right, bottom)
            detections.append(Detection(label, float(segment["score"]), box, mask=mask))
        return detections


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
        self.clip = ClipScores(clip, device, keep_ratio=True)
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
