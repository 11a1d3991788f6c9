"""Transforms: equal to torchvision's up to the order of passes, extreme shapes."""

import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.images.io import image_to_bytes, open_image
from seed_multimodal.images.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    get_transform,
    normalise,
    seed_image_processor,
)

BICUBIC = Image.Resampling.BICUBIC
TRANSFORMS = {
    "squashed": get_transform(keep_ratio=False, image_size=16),
    "cropped": get_transform(keep_ratio=True, image_size=16),
    "seed": seed_image_processor(16),
}


@pytest.mark.parametrize("size", [(50, 30), (33, 33), (7, 90)])
@pytest.mark.parametrize("name", ["squashed", "cropped"])
def test_get_transform_equals_torchvision(size, name):
    # The codes of the originals are of these pixels.
    from torchvision import transforms

    if name == "cropped":
        resize = [transforms.Resize(16), transforms.CenterCrop(16)]
    else:
        resize = [transforms.Resize((16, 16))]
    normalised = [transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    smooth = noise(0, size).resize((4, 4), Image.Resampling.BOX).resize(size, BICUBIC)
    pixels = TRANSFORMS[name](smooth)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    # At most one grey level: the order of the two passes.
    expected = transforms.Compose([*resize, *normalised])(smooth)
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)


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
