"""Drawings as they are saved, and their scores: CLIP's choice among them, texts longer than it reads, and FID."""

from __future__ import annotations

import resource
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel

from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.drawing_work import save_drawing
from seed_multimodal.evaluation.picture_scores import ClipScores, Distance, find_clip

CPU = torch.device("cpu")


def noise(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_cosines_are_those_of_the_whole_model(clip_folder):
    clip = ClipScores.load(clip_folder, CPU)
    pictures = [noise(1), noise(2), noise(3)]
    found = clip.cosines(["ab c", "d"], [pictures[:2], pictures[2:]])
    assert [len(row) for row in found] == [2, 1] and all(-1 <= value <= 1 for row in found for value in row)
    assert clip.cosines(["d"], [pictures])[0][2] == pytest.approx(found[1][0], abs=1e-5)  # neighbours change nothing
    model = CLIPModel.from_pretrained(clip_folder)
    from seed_multimodal.images.transforms import ImageTransform

    pixels = ImageTransform(16, interpolation="bicubic").batch(pictures[:2])
    ids = clip.tokenizer(["ab c"], return_tensors="pt")
    with torch.no_grad():
        out = model(**ids, pixel_values=pixels)
    assert found[0] == pytest.approx((out.image_embeds @ out.text_embeds.T)[:, 0].tolist(), abs=1e-5)


def test_texts_that_clip_cannot_read_whole_are_told(clip_folder):
    clip = ClipScores.load(clip_folder, CPU)
    assert not clip.is_cut("a b c d e f") and clip.is_cut("a b c d e f g") and clip.most == 8
    assert clip.cosines(["a b c d e f g h i j"], [[noise(1)]]) == clip.cosines(["a b c d e f z z"], [[noise(1)]])


def test_a_clip_that_is_not_there_is_one_sentence(tmp_path, clip_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="There is no CLIP .* openai/clip-vit-large-patch14 .* --clip"):
        find_clip(None, tmp_path)
    (tmp_path / "openai_clip_ViT-L-14.bin").write_bytes(b"")
    assert find_clip(None, tmp_path) == tmp_path / "openai_clip_ViT-L-14.bin"
    assert find_clip(clip_folder, tmp_path) == clip_folder
    with pytest.raises(CheckpointError, match="the weights file is empty"):
        ClipScores.load(tmp_path / "openai_clip_ViT-L-14.bin", CPU)


class Colours(nn.Module):
    """Each picture's mean of every channel, in place of Inception's features."""

    num_features = 3

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean((2, 3))


def test_fid_is_the_distance_of_two_gaussians():
    distance = Distance(8, features=Colours())
    real = [noise(seed) for seed in range(6)]
    made = [noise(seed, (8, 8)) for seed in range(10, 15)]
    assert not distance.missing()
    features = [np.array([Colours()(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0].numpy()
                          for picture in several], np.float64)
                for several in ([picture.resize((8, 8), Image.Resampling.BICUBIC) for picture in real], made)]
    (one, other), covariances = [rows.mean(0) for rows in features], [np.cov(rows.T) for rows in features]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    wanted = ((one - other) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots
    assert distance.between(real, made) == pytest.approx(wanted, rel=1e-3)
    assert distance.between(made, made) == pytest.approx(0, abs=1e-6)


def test_fid_without_torchmetrics_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    said = Distance().missing()
    assert said.startswith("FID is not computed (") and "pip install torchmetrics torch-fidelity" in said


def test_nothing_is_downloaded_while_the_hub_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = Distance().missing()
    assert "downloads are off: set HF_HUB_OFFLINE=0" in said and not list(tmp_path.rglob("*.pth"))


def test_weights_of_inception_are_read_as_tensors_only(tmp_path):
    torch.save({"weight": Distance}, tmp_path / "inception.pth")  # a class: what tensors are not
    said = Distance(inception=tmp_path / "inception.pth").missing()
    assert said.startswith("FID is not computed (")
    assert "inception.pth: refused, because it holds more than tensors" in said


def test_a_full_disk_ends_drawing_and_leaves_no_half_picture(tmp_path):
    """No caption is at fault: the next ones would be drawn in vain."""
    picture = noise(0, (64, 64))
    letters = "\U00020000" * 100  # of four bytes each
    assert (tmp_path / save_drawing(picture, tmp_path, 7, letters, "png")).stat().st_size > 4096
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        with pytest.raises(DataError, match=r"000008_fox\.png: cannot be written \(the disk or quota is full"):
            save_drawing(picture, tmp_path, 8, "fox", "png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(list(tmp_path.iterdir())) == 1
