"""FID of drawings (Heusel et al. 2017) by torchmetrics."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import plain_rgb, resize_passes, to_bytes
from seed_multimodal.state_dicts import load_state_dict

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# Of github.com/toshas/torch-fidelity, release v0.2.0.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 32


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
