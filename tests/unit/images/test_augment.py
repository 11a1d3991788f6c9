"""`blip2_image_train`: crops, flips and pixels as torchvision's, decoding at reduced size, wrong
settings.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal import open_image
from seed_multimodal.errors import ImageError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    INTERPOLATIONS,
    normalise,
    to_bytes,
)


def smooth(width, height) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "scale, interpolation", [((0.5, 1.0), "bicubic"), ((0.2, 0.6), "bilinear")]
)
def test_train_transform_equals_torchvision(scale, interpolation):
    """Equal to torchvision's classes with the original settings, for each seed."""
    from torchvision import transforms

    image = smooth(90, 70)
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                32, scale=scale, interpolation=transforms.InterpolationMode(interpolation)
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    transform = TrainTransform(32, *scale, interpolation=interpolation)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.testing.assert_close(
            transform(image, torch.Generator().manual_seed(seed)), expected, atol=2e-2, rtol=0
        )


def photo(width, height, turned: int = 1, **options) -> bytes:
    """A JPEG with detail of all sizes, as in photographs."""
    rng = np.random.default_rng(0)
    layers = [
        Image.fromarray(
            rng.integers(0, 256, (height // d + 1, width // d + 1, 3), np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        for d in (128, 64, 32, 16, 8)
    ]
    mixed = np.average([np.asarray(layer, np.float32) for layer in layers], 0, [16, 8, 4, 2, 1])
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=90, exif=exif, **options
    )
    return file.getvalue()


@pytest.mark.parametrize("stored", [photo(90, 70), photo(480, 640, 6, progressive=True)])
def test_read_decoded_in_full_equals_the_original(stored):
    # With scaled decoding off, a run is the original's to the bit, and so are its random numbers.
    transform = TrainTransform(64, scaled_decoding=False)
    for seed in range(4):
        mine = torch.Generator().manual_seed(seed)
        theirs = torch.Generator().manual_seed(seed)
        assert torch.equal(
            normalise(transform.read(stored, generator=mine)),
            transform(open_image(stored).image, theirs),
        )
        assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize("size, turned, options, interpolation", read_tables(__file__))
def test_read_scaled_gives_the_same_view(size, turned, options, interpolation):
    """The crop's edges are rounded to pixels of the scaled image.

    Within 38 dB of the view of the full image.
    """
    stored = photo(*size, turned, **options)
    transform = TrainTransform(64, interpolation=interpolation)
    image = open_image(stored).image
    for seed in range(4):
        mine = torch.Generator().manual_seed(seed)
        theirs = torch.Generator().manual_seed(seed)
        view = transform.read(stored, generator=mine)
        box = transform.crop_box(image.size, theirs)
        by = next(d for d in (8, 4, 2) if min(box[2] - box[0], box[3] - box[1]) // d >= 64)
        left, top, right, bottom = (by * round(edge / by) for edge in box)
        wanted = image.resize(
            (64, 64),
            INTERPOLATIONS[interpolation],
            box=(left, top, min(right, image.width), min(bottom, image.height)),
        )
        if torch.rand(1, generator=theirs).item() < 0.5:
            wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        error = (view.float() - to_bytes(wanted).float()).square().mean()
        assert view.shape == (3, 64, 64) and view.dtype == torch.uint8
        assert 0 < error < 255**2 / 10**3.8
        assert torch.equal(mine.get_state(), theirs.get_state())


def test_read_of_a_torn_jpeg():
    # Pillow would fill the rest with grey.
    torn = photo(640, 480)[:-2000]
    for scaled in (True, False):
        with pytest.raises(ImageError):
            TrainTransform(32, scaled_decoding=scaled).read(torn, generator=torch.Generator())
