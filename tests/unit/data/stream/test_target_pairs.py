"""Training data of de-tokenizers: views and size conditions of images of folders, tars and lists of
edits.
"""

import pytest
import torch
from data_files import lines
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.stream.targets import TargetPairs, TargetView, by_size
from seed_multimodal.errors import DataError, ImageError

VIEW = TargetView(resolution=16, encoder_size=8)
SQUASHED = TargetView(resolution=16, encoder_size=8, keep_ratio=False)
SIZES = ((16, 16), (16, 24), (24, 16))
SEVERAL = TargetView(encoder_size=8, sizes=SIZES)


def half(left: str, right: str) -> Image.Image:
    image = Image.new("RGB", (48, 32), left)
    image.paste(right, (24, 0, 48, 32))
    return image


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_target_and_encoder_image_show_the_same_crop(case):
    # The crop is central and as large as possible, of the nearest ratio; what is outside is red.
    view = SEVERAL if case["sizes"] else VIEW
    size = tuple(case["size"])
    width, height = size
    target = tuple(case["target"])
    image = Image.new("RGB", size, "red")
    crop_width = min(width, height * target[1] / target[0])
    crop_height = min(height, width * target[0] / target[1])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    image.paste("blue", (round(left), round(top), round(width - left), round(height - top)))
    assert view.size_of(image) == target
    pixels = view.target_image(image, target)
    encoder_pixels = view.encoder_image(image, target)
    assert (pixels.shape, encoder_pixels.shape) == ((3, *target), (3, 8, 8))
    for shown in (pixels, encoder_pixels):
        assert (shown[2, 2:-2, 2:-2] > 240).all()
        assert (shown[0, 2:-2, 2:-2] < 15).all()
    assert view.time_ids(size, target).tolist() == case["ids"]


def test_squashed_images_are_not_cropped():
    image = half("red", "blue")
    for make in (SQUASHED.target_image, SQUASHED.encoder_image):
        pixels = make(image, (16, 16))
        assert pixels[0, 0, 0] > 200 < pixels[2, 0, -1]
    assert SQUASHED.time_ids((48, 32), (16, 16)).tolist() == [32, 48, 0, 0, 16, 16]
    # Of several sizes the key selects one.
    view = TargetView(encoder_size=8, keep_ratio=False, sizes=SIZES[:2])
    chosen = [view.size_of(image, str(key)) for key in range(400)]
    assert 150 < chosen.count(SIZES[0]) < 250
    assert chosen == [view.size_of(image, str(key)) for key in range(400)]


def pairs_of(path, view: TargetView = VIEW, condition: bool = False, **keys):
    source = open_pairs({"files": str(path), **keys}, captioned=False)
    return TargetPairs(source, view, reads_condition=condition)


def test_open_pairs_without_captions(tmp_path):
    # A de-tokenizer learns from images alone.
    half("red", "blue").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    shard = tmp_path / "shard.tar"
    write_shard(shard, [("000", {"png": (tmp_path / "a.png").read_bytes()})])
    folder = pairs_of(tmp_path, format="folder")
    for pairs, key in ((folder, "a.png"), (pairs_of(shard), "000")):
        sample = pairs.get(0)
        assert sample["key"] == key
        assert sample["image"].shape == (3, 16, 16)
        assert sample["encoder_image"].shape == (3, 8, 8)
        assert not sample["conditioned"]
    with pytest.raises(DataError):
        open_pairs({"files": str(shard)})
    with pytest.raises(ImageError, match=r"b\.png"):
        folder.get(1)


def test_get_of_edits(tmp_path):
    # SEED-X's edits: the drawing keeps what the source image shows.
    before, after = half("red", "blue"), half("blue", "red")
    before.save(tmp_path / "before.png")
    after.save(tmp_path / "after.png")
    rows = [
        {"source_image": "before.png", "target_image": "after.png"},
        {"target_image": "after.png"},
        {"source_image": "gone.png", "target_image": "after.png"},
    ]
    path = lines(tmp_path / "edits.jsonl", rows)
    keys = {"image_key": "target_image", "condition_key": "source_image"}
    pairs = pairs_of(path, condition=True, **keys)
    sample = pairs.get(0)
    assert sample["conditioned"]
    assert torch.equal(sample["condition"], VIEW.target_image(before, (16, 16)))
    assert torch.equal(sample["image"], VIEW.target_image(after, (16, 16)))
    with pytest.raises(DataError, match="line 2: .*'source_image'"):
        pairs.source.read(1)
    with pytest.raises(ImageError, match=r"line 3: .*gone\.png"):
        pairs.source.read(2)
    # Without a key of the condition it is empty.
    alone = pairs_of(path, condition=True, image_key="target_image").get(0)
    assert not alone["conditioned"]
    assert not alone["condition"].any()


def test_by_size(tmp_path):
    # A batch of several sizes is drawn in one part per size.
    for index, size in enumerate([(20, 20), (30, 20), (22, 22), (20, 33), (60, 40)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    pairs = pairs_of(tmp_path, SEVERAL)
    batches = by_size([pairs.get(index) for index in range(5)])
    keys = {batch["image"].shape: batch["key"] for batch in batches}
    assert keys == {
        (2, 3, 16, 16): ["0.png", "2.png"],
        (2, 3, 16, 24): ["1.png", "4.png"],
        (1, 3, 24, 16): ["3.png"],
    }
