"""The fixed lists that everything is measured on, and the files of the world."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib

import pytest
from PIL import Image

from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.errors import DataError
from seed_nano.world.__main__ import main
from seed_nano.world.evaluation import HELD_OUT_SPLITS, check_lists, scenes
from seed_nano.world.place import find_world
from seed_nano.world.splits import split_of
from seed_nano.world.sprites import check_files, load_sprites
from seed_nano.world.things import THINGS


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()
_HEADER = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
BOMB = PNG[:12] + _HEADER + struct.pack(">I", zlib.crc32(_HEADER)) + PNG[33:]  # claims 60,000 x 60,000 pixels


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(find_world(), tmp_path / "nano")


def test_every_held_out_split_has_a_list_of_its_own_scenes():
    assert check_lists(find_world()) == dict.fromkeys(HELD_OUT_SPLITS, 1000)
    for split in HELD_OUT_SPLITS:
        assert {split_of(scene) for scene in scenes(split)} == {split}
    assert all(any(THINGS[name].held_out for name in scene.things) for scene in scenes("things"))
    with pytest.raises(DataError, match=r"no list of split 'pair' \(did you mean 'pairs'\?\)"):
        scenes("pair")


@pytest.mark.parametrize(("row", "words"), [
    (["noto", "blue", "large", ["tigger"], [1], 5], r"evaluation\.json: val 3: no such scene"),
    (["noto", "blue"], "val 3: is no scene"),
    (["noto", "white", "large", ["goat"], [1], 5], "val 3 is of split things"), (0, "val 3 looks like an earlier one")])
def test_a_planted_scene_is_found(copy, row, words):
    lists = json.loads((copy / "evaluation.json").read_text())
    lists["val"][3] = row or lists["val"][0]
    (copy / "evaluation.json").write_text(json.dumps(lists))
    with pytest.raises(DataError, match=words):
        check_lists(copy)
    with pytest.raises(DataError, match=r"evaluation\.json: its sha256 is not the manifest's"):
        check_files(copy)


def test_a_lost_or_changed_file_is_named(copy, monkeypatch, capsys):
    (copy / "evaluation.json").unlink()
    with pytest.raises(DataError, match=r"evaluation\.json is not there"):
        check_files(copy)
    for lists in ({}, {"val": 5}, {"val": []}):  # of an empty list, training scenes would be read
        (copy / "evaluation.json").write_text(json.dumps(lists))
        with pytest.raises(DataError, match="it has no list 'val', or an empty one; build it with"):
            scenes("val", copy)
    (copy / "sprites.tar").write_bytes((copy / "sprites.tar").read_bytes()[:700_000])
    with pytest.raises(DataError, match=r"sprites\.tar"):
        load_sprites(copy)
    monkeypatch.setenv("SEED_NANO_DATA", str(copy))
    assert main(["check", "--samples", "1"]) == 2 and "sprites.tar: its sha256" in capsys.readouterr().err
    (copy / "sprites.tar").unlink()
    with pytest.raises(DataError, match=r"sprites\.tar"):
        load_sprites(copy)


@pytest.mark.parametrize(("drawing", "words"), [
    (None, "it has no drawing of 'dog' in style 'noto'"), (b"", r"sample noto-dog: the file is empty"),
    (b"junk", "sample noto-dog: not a picture"), (BOMB, "sample noto-dog: refused unread"),
    (PNG[:-30], "sample noto-dog: a damaged drawing")])
def test_a_drawing_that_cannot_be_used_is_named(tmp_path, drawing, words):
    (tmp_path / "manifest.json").write_text("{}")
    write_shard(tmp_path / "sprites.tar", [("noto-dog", {"txt": b""} if drawing is None else {"webp": drawing})])
    with pytest.raises(DataError, match=f"{words}.*uild it with"):
        load_sprites(tmp_path)
