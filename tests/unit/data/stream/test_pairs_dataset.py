"""`PairDataset`: an image with one of its captions, with reproducible randomness."""

import pytest
import torch
from data_files import jpeg, write_tar

from seed_multimodal import open_image
from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.transforms import normalise, seed_image_processor
from seed_multimodal.models.seed.captions import BlipCaption

PLAIN = seed_image_processor(16)


def test_get(shards):
    # Captions as BLIP's training cleans them.
    data = PairDataset(Pairs(f"{shards}/*.tar"), PLAIN, BlipCaption("a photo of "))
    assert len(data) == sum(data.shard_sizes) == 40
    sample = data.get(17, 0)
    assert sample["key"] == "00017"
    assert sample["caption"] == "a photo of picture 17"
    assert sample["image"].dtype == torch.uint8  # a quarter of normalised values
    assert torch.equal(normalise(sample["image"]), PLAIN(open_image(jpeg(17)).image))


@pytest.mark.parametrize("package", ["ours", "torchvision"])
def test_get_is_random_by_seed_epoch_index(shards, package):
    from torchvision import transforms  # slow to import

    transform = TrainTransform(16)
    if package == "torchvision":
        transform = transforms.Compose([transforms.RandomResizedCrop(16), transforms.ToTensor()])
    pairs = Pairs(shards / "s-000.tar")

    def view(seed, epoch, index):
        return PairDataset(pairs, transform, seed=seed).get(index, epoch)["image"]

    # The generator that a training draws from is not used.
    state = torch.get_rng_state()
    first = view(0, 0, 5)
    assert torch.equal(first, view(0, 0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((1, 0, 5), (0, 1, 5), (0, 0, 6)):
        assert not torch.equal(first, view(*other))


def test_get_one_of_several_captions(tmp_path):
    # All are used over the epochs, and a resumed run repeats the choices.
    sample = {"__key__": "a", "jpg": jpeg(0), "json": {"caption": ["One", "Two"]}}
    data = PairDataset(Pairs(write_tar(tmp_path / "x.tar", [sample])), PLAIN, BlipCaption())
    chosen = [data.get(0, epoch)["caption"] for epoch in range(60)]
    assert chosen == [data.get(0, epoch)["caption"] for epoch in range(60)]
    assert set(chosen) == {"one", "two"}
    assert 15 < chosen.count("one") < 45
