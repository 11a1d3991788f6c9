"""Transforms of extreme shapes and of files (pixels: golden `preprocessing`)."""

import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.images.io import image_to_bytes, open_image
from seed_multimodal.images.transforms import (
    ImageTransform,
    get_transform,
    normalise,
    seed_image_processor,
)

TRANSFORMS = {
    "squashed": get_transform(keep_ratio=False, image_size=16),
    "cropped": get_transform(keep_ratio=True, image_size=16),
    "seed": seed_image_processor(16),
}


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (2, 200)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_extreme_shapes(size, name):
    # A banner of one pixel must neither fail nor fill the memory.
    transform = TRANSFORMS[name]
    seen = transform.to_image(transform(Image.new("RGB", size, (90, 120, 200))))
    assert seen.size == (16, 16) and seen.getpixel((10, 10)) == (90, 120, 200)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_read_equals_open_and_transform(name):
    """Never decoded at a lower resolution: codes would differ."""
    stored = image_to_bytes(noise(0, (300, 200)), "JPEG")
    transform = TRANSFORMS[name]
    assert torch.equal(normalise(transform.read(stored)), transform(open_image(stored).image))


@pytest.mark.parametrize("size", [(300, 200), (20, 90), (16, 16), (1, 30_000)])
@pytest.mark.parametrize("shorter_side", [None, 8, 21])
@pytest.mark.parametrize("keep_ratio", [True, False])
def test_uncropped_of_a_resized_image(size, shorter_side, keep_ratio):
    # Threads resize images before the encoder does: the codes must stay.
    transform = ImageTransform(16, keep_ratio, shorter_side=shorter_side)
    image = noise(0, size)
    small = transform.uncropped(transform.resize(image))
    assert torch.equal(transform(small), transform(image))
