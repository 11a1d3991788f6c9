"""Scores of generated images: CLIP, FID; saving them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from full_disk import file_size_limit
from PIL import Image
from random_images import noise
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation import drawing as module
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Run, Task
from seed_multimodal.evaluation.drawing import (
    ClipScores,
    fid,
    fid_metric,
    fid_note,
    find_clip,
    save_drawing,
)
from seed_multimodal.images.transforms import ImageTransform

CPU = torch.device("cpu")


def test_cosines_equal_those_of_clip(clip_folder):
    clip = ClipScores(clip_folder, CPU)
    images = [noise(1), noise(2), noise(3)]
    cosines = clip.cosines(["ab c", "d"], [images[:2], images[2:]])
    assert [len(row) for row in cosines] == [2, 1]
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip_folder)(
            **CLIPTokenizer.from_pretrained(clip_folder)(["ab c"], return_tensors="pt"),
            pixel_values=ImageTransform(16, interpolation="bicubic").batch(images[:2]),
        )
    assert cosines[0] == pytest.approx(
        (out.image_embeds @ out.text_embeds.T)[:, 0].tolist(), abs=1e-5
    )
    # longer texts are truncated
    assert clip.cosines(["a b c d e f g h i"], [[noise(1)]]) == clip.cosines(
        ["a b c d e f z"], [[noise(1)]]
    )


def test_find_clip_without_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="openai/clip-vit-large-patch14 .* --clip"):
        find_clip(None)
    assert find_clip(tmp_path) == tmp_path


class Colours(nn.Module):
    """Each image's mean of every channel, in place of Inception's features."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_fid_equals_the_distance_of_two_gaussians(tmp_path, monkeypatch):
    from torchmetrics.image.fid import FrechetInceptionDistance

    monkeypatch.setattr(module, "BATCH", 4)
    real = [noise(seed) for seed in range(6)]
    drawings = [noise(seed, (8, 8)) for seed in range(10, 16)]
    for index in range(6):
        real[index].save(tmp_path / f"real{index}.png")
        drawings[index].save(tmp_path / f"drawn{index}.png")
    samples = [Sample(index, "", f"real{index}.png") for index in range(6)]
    run = Run(Task("text2image"), tmp_path / "t.json", tmp_path, resolution=8)
    distance = fid(
        FrechetInceptionDistance(Colours(), normalize=True),
        run,
        samples,
        [tmp_path / f"drawn{index}.png" for index in range(6)],
    )
    features = [
        np.array([np.asarray(image, float).mean((0, 1)) / 255 for image in images])
        for images in ([image.resize((8, 8), Image.Resampling.BICUBIC) for image in real], drawings)
    ]
    means = [rows.mean(0) for rows in features]
    covariances = [np.cov(rows.T) for rows in features]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = (
        ((means[0] - means[1]) ** 2).sum()
        + np.trace(covariances[0])
        + np.trace(covariances[1])
        - 2 * roots
    )
    assert distance == pytest.approx(expected, rel=1e-3)


def test_fid_note():
    assert "FID of 1,999 images is biased" in fid_note(1999) and not fid_note(2000)


def test_fid_metric_with_missing_or_unsafe_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="no Inception weights; download torch-fidelity"):
        fid_metric(None)
    torch.save({"weight": Run}, tmp_path / "inception.pth")  # a class, not a tensor
    with pytest.raises(CheckpointError, match="unsafe pickle content"):
        fid_metric(tmp_path / "inception.pth")


def test_save_drawing_on_a_full_disk_leaves_no_partial_file(tmp_path):
    image = noise(0, (64, 64))
    assert (tmp_path / save_drawing(image, tmp_path, 7, "\U00020000" * 100)).stat().st_size > 4096
    error = r"000008_fox\.png: cannot be written \(the disk or quota is full"
    with file_size_limit(1024), pytest.raises(DataError, match=error):
        save_drawing(image, tmp_path, 8, "fox")
    assert len(list(tmp_path.iterdir())) == 1
