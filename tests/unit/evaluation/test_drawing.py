"""Scores of generated images: CLIP, FID."""

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.clip import Clip
from seed_multimodal.evaluation.fid import fid, fid_metric
from seed_multimodal.images.transforms import ImageTransform

CPU = torch.device("cpu")


@torch.no_grad()
def test_cosines_equal_those_of_transformers(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    clip = Clip(clip_folder, CPU)
    images = [noise(1), noise(2)]
    features = clip.images(images)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(["ab c"], return_tensors="pt")
    pixels = ImageTransform(16, interpolation="bicubic").batch(images)
    out = CLIPModel.from_pretrained(clip_folder)(**tokens, pixel_values=pixels)
    expected = out.image_embeds @ out.text_embeds.T
    # Longer texts are truncated.
    cosines = features @ clip.texts(["ab c", "a " * 40]).T
    torch.testing.assert_close(cosines[:, :1], expected, atol=1e-5, rtol=0)
    assert features[0] @ features[1] < 0.9999


class Colours(torch.nn.Module):
    """Each image's mean of every channel, in place of Inception's features."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.slow
def test_fid_equals_that_of_all_images_at_once(tmp_path):
    # Only sums are kept from batch to batch.
    from torchmetrics.image.fid import FrechetInceptionDistance

    n_images = 33  # more than one batch
    images = []
    files = []
    expected = FrechetInceptionDistance(Colours(), normalize=True)
    for index in range(n_images):
        real, drawn = noise(index), noise(100 + index, (8, 8))
        files.append(tmp_path / f"drawn{index}.png")
        drawn.save(files[-1])
        images.append(real)
        # Real images are made as large as drawings.
        square = real.resize((8, 8), Image.Resampling.BICUBIC)
        for image, is_real in ((square, True), (drawn, False)):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            expected.update(pixels[None], real=is_real)
    metric = FrechetInceptionDistance(Colours(), normalize=True)
    assert fid(metric, images, files, resolution=8) == pytest.approx(
        float(expected.compute()), rel=1e-3
    )


def test_fid_metric_with_missing_or_unsafe_weights(tmp_path, monkeypatch):
    # torch-fidelity would unpickle the file.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="--inception"):
        fid_metric(None)
    torch.save({"weight": Colours}, tmp_path / "inception.pth")  # a class, not a tensor
    with pytest.raises(CheckpointError, match=r"inception\.pth"):
        fid_metric(tmp_path / "inception.pth")
