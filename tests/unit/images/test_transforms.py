"""Transforms: equal to torchvision's up to the order of passes, extreme shapes."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    denormalise,
    get_transform,
    normalise,
    resize_passes,
    seed_image_processor,
    to_bytes,
)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (33, 33), (20, 41), (7, 90)])
@pytest.mark.parametrize("keep_ratio", [True, False])
def test_get_transform_equals_torchvision(size, keep_ratio):
    from torchvision import transforms as T

    target = 16
    resize = (
        [T.Resize(target), T.CenterCrop(target)] if keep_ratio else [T.Resize((target, target))]
    )
    reference = T.Compose([*resize, T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])
    smooth = (
        noise(0, size).resize((4, 4), Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
    )
    pixels = get_transform("clip", keep_ratio=keep_ratio, image_size=target)(smooth)
    assert pixels.shape == (3, target, target) and pixels.dtype == torch.float32
    assert (
        pixels - reference(smooth)
    ).abs().max() < 0.02  # at most one grey level: the order of the two passes


def test_seed_image_processor_differs_from_get_transform():
    image = noise(0, (64, 48))
    squash = get_transform("clip", keep_ratio=False, image_size=16)(image)
    bicubic = seed_image_processor(16)(image)
    assert (squash - bicubic).abs().max() > 0.1
    assert torch.equal(bicubic, get_transform("blip", False, 16, "bicubic")(image))


@pytest.mark.parametrize("size", [(40, 30), (13, 29), (16, 16), (9, 100), (100, 7)])
def test_resize_passes_has_a_fixed_order(size):
    image = noise(0, size)
    target = (16, 16)
    bicubic = Image.Resampling.BICUBIC
    rows_first = image.resize((16, image.height), bicubic).resize(target, bicubic)
    columns_first = image.resize((image.width, 16), bicubic).resize(target, bicubic)
    tall = size in ((13, 29), (9, 100))
    assert (
        resize_passes(image, target, bicubic).tobytes()
        == (columns_first if tall else rows_first).tobytes()
    )


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (2, 200)])
def test_get_transform_of_extreme_shapes(size):
    image = Image.new("RGB", size, (90, 120, 200))
    for keep_ratio in (True, False):
        pixels = get_transform("clip", keep_ratio=keep_ratio, image_size=224)(image)
        assert pixels.shape == (3, 224, 224)
        assert denormalise(pixels).getpixel((100, 100)) == (90, 120, 200)


def test_denormalise_of_normalise():
    image = noise(0, (9, 5))
    pixels = to_bytes(image)
    assert pixels.shape == (3, 5, 9) and pixels.dtype == torch.uint8
    assert denormalise(normalise(pixels)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "transform",
    [get_transform("clip", False, 16), get_transform("clip", True, 16), seed_image_processor(16)],
)
def test_read_equals_open_and_transform(transform):
    """Never decoded at a lower resolution: codes would differ."""
    file = io.BytesIO()
    noise(0, (300, 200)).save(file, "JPEG")
    assert torch.equal(
        normalise(transform.read(file.getvalue())), transform(open_image(file.getvalue()))
    )
