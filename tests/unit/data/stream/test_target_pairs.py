"""Training data of de-tokenizers: views and size conditions of images of folders, tars and lists of
edits.
"""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.stream.pairs_dataset import TargetPairs, TargetView, by_size, open_images
from seed_multimodal.errors import DataError, ImageError

VIEW = TargetView(resolution=16, encoder_size=8)
SIZE = (16, 16)


def half(left: str, right: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def test_target_and_encoder_image_show_the_same_crop():
    """The outer sixths of a wide image are cropped from both; without keep_ratio, nothing is."""
    wide = Image.new("RGB", (48, 32), "red")
    wide.paste("blue", (8, 0, 40, 32))
    for make in (VIEW.target_image, VIEW.encoder_image):
        assert (
            make(wide, SIZE)[:, :, 2:-2]
            == torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]
        ).all()
    squashed = TargetView(resolution=16, encoder_size=8, keep_ratio=False)
    for make in (squashed.target_image, squashed.encoder_image):
        pixels = make(wide, SIZE)
        assert pixels[0, 0, 0] > 200 > 50 > pixels[0, 0, pixels.shape[2] // 2]


@pytest.mark.parametrize(
    ("size", "keep_ratio", "ids"),
    [
        ((48, 32), True, [32, 48, 0, 4, 16, 16]),
        ((32, 48), True, [48, 32, 4, 0, 16, 16]),
        ((16, 16), True, [16, 16, 0, 0, 16, 16]),
        ((48, 32), False, [32, 48, 0, 0, 16, 16]),
    ],
)
def test_time_ids(size, keep_ratio, ids):
    """Sizes of the file, top left of the crop, size of the drawing; heights first."""
    assert TargetView(16, 8, keep_ratio).time_ids(size, SIZE).tolist() == ids


def test_open_images_without_captions(tmp_path):
    """Of a folder and of a tar; with `captioned`, both raise."""
    (tmp_path / "folder").mkdir()
    half("red", "blue").save(tmp_path / "folder" / "a.png")
    (tmp_path / "folder" / "b.png").write_bytes(b"")
    write_shard(
        tmp_path / "shard.tar", [("000", {"png": (tmp_path / "folder" / "a.png").read_bytes()})]
    )
    for source_name, key in (("folder", "a.png"), ("shard.tar", "000")):
        pairs = TargetPairs(open_images({"files": str(tmp_path / source_name)}), VIEW, log=None)
        pair = pairs.get(0)
        assert (
            pair["key"] == key
            and pair["image"].shape == (3, 16, 16)
            and pair["encoder_image"].shape == (3, 8, 8)
        )
        assert not pair["conditioned"] and "condition" not in pair
        with pytest.raises(DataError):
            open_images({"files": str(tmp_path / source_name), "captioned": True})
    pairs = TargetPairs(open_images({"files": str(tmp_path / "folder")}), VIEW, log=None)
    assert pairs.get(1)["key"] == "a.png" and [key for key, _ in pairs.bad] == ["b.png"]


def test_get_of_edits(tmp_path):
    half("red", "blue").save(tmp_path / "before.png")
    half("blue", "red").save(tmp_path / "after.png")
    lines = [
        {"source_image": "before.png", "target_image": "after.png"},
        {"target_image": "after.png"},
        {"source_image": "gone.png", "target_image": "after.png"},
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_images(
        {
            "files": str(tmp_path / "edits.jsonl"),
            "image_key": "target_image",
            "condition_key": "source_image",
        }
    )
    pair = TargetPairs(source, VIEW, reads_condition=True, log=None).get(0)
    assert pair["conditioned"] and torch.equal(
        pair["condition"], VIEW.target_image(half("red", "blue"), SIZE)
    )
    assert torch.equal(pair["image"], VIEW.target_image(half("blue", "red"), SIZE))
    with pytest.raises(DataError, match="line 2: has no image: nothing under key 'source_image'"):
        source.read(1)
    with pytest.raises(ImageError, match=r"line 3: image gone\.png not found"):
        source.read(2)
    alone = open_images({"files": str(tmp_path / "edits.jsonl"), "image_key": "target_image"})
    pair = TargetPairs(alone, VIEW, reads_condition=True, log=None).get(0)
    assert not pair["conditioned"] and not pair["condition"].any()


# ---- several sizes in one run

SIZES = ((16, 16), (16, 24), (24, 16))


@pytest.mark.parametrize(
    ("size", "target", "ids"),
    [
        ((40, 40), (16, 16), [40, 40, 0, 0, 16, 16]),
        ((45, 30), (16, 24), [30, 45, 0, 0, 16, 24]),
        ((80, 30), (16, 24), [30, 80, 0, 9, 16, 24]),
        ((20, 60), (24, 16), [60, 20, 12, 0, 24, 16]),
    ],
)
def test_size_of_the_nearest_ratio(size, target, ids):
    """The crop is central and as large as possible.

    The vision encoder gets the same part, squashed.
    """
    view = TargetView(encoder_size=8, sizes=SIZES)
    image = Image.new("RGB", size, "red")
    width, height = size
    crop = min(width, height * target[1] / target[0]), min(height, width * target[0] / target[1])
    across = (width - crop[0]) / 2
    down = (height - crop[1]) / 2
    image.paste("blue", (round(across), round(down), round(width - across), round(height - down)))
    assert view.size_of(image) == target and view.time_ids(size, target).tolist() == ids
    pair = view.target_image(image, target), view.encoder_image(image, target)
    assert [pixels.shape for pixels in pair] == [(3, *target), (3, 8, 8)]
    for pixels in pair:
        assert (pixels[2, 2:-2, 2:-2] > 240).all() and (pixels[0, 2:-2, 2:-2] < 15).all()


def test_size_of_squashed_images():
    """The key selects one of the sizes, and the image is not cropped."""
    view = TargetView(encoder_size=8, keep_ratio=False, sizes=SIZES[:2])
    image = half("red", "blue")
    chosen = [view.size_of(image, str(key)) for key in range(400)]
    assert 150 < chosen.count(SIZES[0]) < 250 and chosen == [
        view.size_of(image, str(key)) for key in range(400)
    ]
    pixels = view.target_image(image, SIZES[1])
    assert pixels.shape == (3, 16, 24) and pixels[0, 0, 0] > 200 and pixels[2, 0, -1] > 200
    assert view.time_ids((48, 32), SIZES[1]).tolist() == [32, 48, 0, 0, 16, 24]


def test_by_size(tmp_path):
    for index, size in enumerate([(20, 20), (30, 20), (22, 22), (20, 33), (60, 40)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    pairs = TargetPairs(
        open_images({"files": str(tmp_path)}), TargetView(encoder_size=8, sizes=SIZES), log=None
    )
    batches = by_size([pairs.get(index) for index in range(5)])
    assert [batch["image"].shape for batch in batches] == [
        (2, 3, 16, 16),
        (2, 3, 16, 24),
        (1, 3, 24, 16),
    ]
    assert [batch["key"] for batch in batches] == [
        ["0.png", "2.png"],
        ["1.png", "4.png"],
        ["3.png"],
    ]
