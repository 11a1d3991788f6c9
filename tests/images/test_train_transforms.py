"""`blip2_image_train`: the crops and mirror images torchvision draws, CLIP's pixels, settings that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.train_transforms import TrainTransform
from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD, denormalise


def smooth(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.2, 0.6)])
def test_it_is_the_released_transform(scale: tuple[float, float]) -> None:
    """Equal to torchvision's classes with the released settings, draw for draw."""
    picture = smooth(90, 70)
    theirs = transforms.Compose([
        transforms.RandomResizedCrop(32, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    mine = TrainTransform(32, *scale)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = theirs(picture)
        torch.testing.assert_close(mine(picture, torch.Generator().manual_seed(seed)), expected, atol=2e-2, rtol=0)


def test_it_follows_its_generator_and_leaves_the_global_one() -> None:
    picture = smooth(50, 60)
    state = torch.get_rng_state()
    views = [TrainTransform(16)(picture, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert views[0].shape == (3, 16, 16) and views[0].dtype == torch.float32
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    torch.manual_seed(7)
    assert torch.equal(TrainTransform(16)(picture), TrainTransform(16)(picture, torch.Generator().manual_seed(7)))


def test_half_are_mirrored_and_the_whole_can_be_kept() -> None:
    left = Image.new("RGB", (40, 40))
    left.paste((255, 255, 255), (0, 0, 20, 40))
    generator = torch.Generator().manual_seed(0)
    views = [denormalise(TrainTransform(8, 1.0, 1.0)(left, generator)) for _ in range(80)]
    mirrored = sum(view.getpixel((0, 4))[0] < view.getpixel((7, 4))[0] for view in views)
    assert 25 < mirrored < 55
    assert {view.getpixel((0, 4))[0] for view in views} == {0, 255}


def test_pictures_of_other_modes() -> None:
    assert TrainTransform(8)(Image.new("L", (20, 20), 128), torch.Generator()).shape == (3, 8, 8)
    assert denormalise(TrainTransform(8)(Image.new("RGBA", (20, 20)), torch.Generator())).getpixel((3, 3)) == (255,) * 3


@pytest.mark.parametrize("settings", [{"image_size": 0}, {"image_size": 2.5}, {"image_size": True}, {"min_scale": 0.0},
                                      {"min_scale": 0.9, "max_scale": 0.5}, {"max_scale": 1.5}])
def test_settings_that_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[1]):
        TrainTransform(**settings)
