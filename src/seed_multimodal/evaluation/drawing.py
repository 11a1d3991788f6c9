"""Measures of drawings: CLIP's cosines with texts and images, and FID."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.metrics import finite
from seed_multimodal.evaluation.openai_clip import load_openai_clip
from seed_multimodal.evaluation.retrieval import ClipEncoder, clip_texts
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import ImageTransform, plain_rgb, resize_passes, to_bytes
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.state_dicts import load_state_dict

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# Of github.com/toshas/torch-fidelity, release v0.2.0.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 32


class ClipScores:
    """Image and text encoder of a CLIP folder (transformers) or of OpenAI's file, in fp32.

    keep_ratio: images are cropped to squares, as by CLIP's own preprocessing; False: squashed.
    Raises CheckpointError: a part is missing.
    """

    def __init__(self, path: Path, device: torch.device, *, keep_ratio: bool = False) -> None:
        self.path = path
        if path.is_file():
            vision, self.texts = load_openai_clip(path, device)
        else:
            vision = load_clip_vision(path, device=device, log=None)
            self.texts = clip_texts(path, device)
        transform = ImageTransform(
            vision.config.image_size, keep_ratio=keep_ratio, interpolation="bicubic"
        )
        self.images = ClipEncoder(vision, transform)

    def similarity(self, images: Sequence[Image.Image], features: Tensor) -> Tensor:
        """Cosines [N, T] of images and unit features [T, E]. Raises DataError: not finite."""
        cosines = F.normalize(self.images.embed(images), dim=-1) @ features.T
        finite(cosines.cpu(), str(self.path))
        return cosines

    def cosines(self, text: str, images: Sequence[Image.Image]) -> list[float]:
        """Cosines of a text, which is truncated to CLIP's length, with images."""
        cosines: list[float] = self.similarity(images, self.texts([text]))[:, 0].tolist()
        return cosines

    def image_cosine(self, image: Image.Image, other: Image.Image) -> float:
        """The cosine of two images (CLIP-I)."""
        features = F.normalize(self.images.embed([other]), dim=-1)
        return float(self.similarity([image], features))


def fid_metric(inception: Path | None) -> FrechetInceptionDistance:
    """FID (Heusel et al. 2017) by torchmetrics.

    Args:
        inception: torch-fidelity's weights (None: in torch's cache).

    Raises:
        ImportError: torchmetrics or torch-fidelity (the extra eval) is missing.
        CheckpointError: no or bad weights.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = Path(inception or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION}")
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no Inception weights; download torch-fidelity's (--inception)"
        )
    # torch-fidelity unpickles its input: pass tensors only.
    with tempfile.TemporaryDirectory() as folder:
        safe_file = f"{folder}/{INCEPTION}"
        torch.save(load_state_dict(file), safe_file)
        return FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=safe_file)


def fid(
    metric: FrechetInceptionDistance,
    images: Iterable[Image.Image],
    drawings: Sequence[Path],
    resolution: int,
) -> float:
    """FID of two drawings or more from real images, which are made squares first."""
    size = (resolution, resolution)
    squares = (resize_passes(plain_rgb(image), size, Image.Resampling.BICUBIC) for image in images)
    drawn = (open_image(path).image for path in drawings)
    for are_real, stream in ((True, squares), (False, drawn)):
        # One batch at a time; the metric keeps sums of features only.
        for _ in range(0, len(drawings), BATCH):
            batch = islice(stream, BATCH)
            pixels = torch.stack([to_bytes(image) for image in batch])  # uint8 [B, 3, S, S]
            metric.update(pixels.to(metric.device).float() / 255, real=are_real)
    return float(metric.compute())
