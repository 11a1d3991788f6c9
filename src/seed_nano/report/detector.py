"""The judge as a detector of `seed eval geneval --judge nano`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from seed_multimodal.evaluation.detection import Detection, Limits
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.scoring import image_labels
from seed_nano.world.scene import anchors
from seed_nano.world.targets import ARRANGEMENTS
from seed_nano.world.things import THINGS


class NanoDetector:
    """Things where the layout that the judge sees has them; their colours are styles."""

    limits = Limits(0.5, 0.5)  # the judge is certain
    knows_colours = True
    labels = frozenset(THINGS)

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def detect(
        self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]
    ) -> list[list[Detection]]:
        """The things of each image that are among its labels."""
        detections: list[list[Detection]] = []
        for image, read, names in zip(
            images, image_labels(self.judge, images), labels, strict=True
        ):
            # The drawings of the arrangement that the judge sees; it reads every label.
            first, second, style, _, arrangement = [value or "" for value in read]
            found: list[Detection] = []
            for kind, x, y, side in anchors(*ARRANGEMENTS[arrangement]):
                name = (first, second)[kind]
                box = (
                    (x - side / 2) * image.width,
                    (y - side / 2) * image.height,
                    (x + side / 2) * image.width,
                    (y + side / 2) * image.height,
                )
                if name in names:
                    found.append(Detection(name, 1.0, box, style))
            detections.append(found)
        return detections


def open_detector(device: torch.device) -> NanoDetector:
    """The shipped judge."""
    return NanoDetector(Judge.from_pretrained(find_judge("nano")).to(device))
