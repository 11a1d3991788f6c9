"""`PairDataset`: reproducible randomness.

Bad samples are named, counted and replaced, and many end the run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_files import jpeg, write_tar
from torch import Tensor
from torchvision import transforms

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.pairs_dataset import PairDataset, sample_seed
from seed_multimodal.errors import DataError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.io import open_image
from seed_multimodal.images.transforms import normalise, seed_image_processor
from seed_multimodal.models.seed.captions import BlipCaption

PLAIN = seed_image_processor(16)


def test_get(
    shards: Path,
):
    data = PairDataset(Pairs(f"{shards}/*.tar"), PLAIN, BlipCaption("a photo of "))
    assert len(data) == 40 and sum(data.shard_sizes) == 40
    sample = data.get(17, 0)
    assert (
        sample["caption"] == "a photo of picture 17"
        and sample["key"] == "00017"
        and sample["index"] == 17
    )
    assert sample["image"].dtype == torch.uint8  # a quarter of normalised values
    assert torch.equal(normalise(sample["image"]), PLAIN(open_image(jpeg(17)))) and not data.bad
    assert PairDataset(data.source, PLAIN).get(17, 0)["caption"] == "Picture 17."


def test_get_is_random_by_seed_epoch_index(shards: Path):
    def view(seed: int, epoch: int, index: int) -> Tensor:
        return PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), seed=seed).get(
            index, epoch
        )["image"]

    state = torch.get_rng_state()
    first = view(0, 0, 5)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, view(0, 0, 5))
    assert not any(torch.equal(first, view(*other)) for other in ((1, 0, 5), (0, 1, 5), (0, 0, 6)))
    assert len({sample_seed(s, e, i) for s in range(6) for e in range(6) for i in range(6)}) == 216


def test_get_with_a_transform_of_torchvision(shards: Path):
    """torch's global generator is seeded during the call and restored after it."""
    transform = transforms.Compose([transforms.RandomResizedCrop(16), transforms.ToTensor()])
    data = PairDataset(Pairs(f"{shards}/*.tar"), transform, seed=3)
    state = torch.get_rng_state()
    first = data.get(2, 0)["image"]
    assert torch.equal(data.get(2, 0)["image"], first) and not torch.equal(
        data.get(2, 1)["image"], first
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_get_one_of_several_captions(
    tmp_path,
):
    path = write_tar(
        tmp_path / "x.tar", [{"__key__": "a", "jpg": jpeg(0), "json": {"caption": ["One", "Two"]}}]
    )
    data = PairDataset(Pairs(path), PLAIN, BlipCaption())
    chosen = [data.get(0, epoch)["caption"] for epoch in range(60)]
    assert chosen == [data.get(0, epoch)["caption"] for epoch in range(60)]
    assert set(chosen) == {"one", "two"} and max(map(chosen.count, chosen)) < 45


def test_get_of_broken_images(
    tmp_path,
):
    spoiled = {3: jpeg(3)[:-400], 4: b"", 8: b"<html>404 not found</html>", 11: jpeg(11)[:-400]}
    samples = [
        {"__key__": f"{n:03d}", "jpg": spoiled.get(n, jpeg(n)), "json": {"caption": f"Number {n}!"}}
        for n in range(12)
    ]
    del samples[5]["jpg"]
    broken = write_tar(tmp_path / "broken.tar", samples)
    logged = list[str]()
    data = PairDataset(Pairs(broken), PLAIN, log=logged.append)
    assert [data.get(index, 0)["index"] for index in range(12)] == [
        0,
        1,
        2,
        6,
        6,
        6,
        6,
        7,
        9,
        9,
        10,
        0,
    ]
    assert [key for key, _ in data.bad] == ["003", "004", "005", "008", "011"]
    for (key, reason), message in zip(
        data.bad, ["truncated", "0 bytes", "no image", "not an image", "truncated"], strict=True
    ):
        assert (
            reason.startswith(f"{broken}: sample {key}: ")
            and message in reason
            and "\n" not in reason
        )
    assert logged == [
        f"skipped: {reason}" for _, reason in data.bad
    ]  # each once, though read several times
    data = PairDataset(Pairs(broken), PLAIN, max_bad_in_a_row=3, log=None)
    assert data.get(4, 0)["index"] == 6
    with pytest.raises(
        DataError, match=r"3 consecutive samples from index 3 on .* 005: has no image"
    ):
        data.get(3, 0)
