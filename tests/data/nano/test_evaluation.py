"""The fixed lists that everything is measured on, and the files of the world."""

from __future__ import annotations

import json
import shutil

import pytest

from seed_multimodal.data.nano.__main__ import main
from seed_multimodal.data.nano.evaluation import HELD_OUT_SPLITS, check_lists, scenes
from seed_multimodal.data.nano.place import find_world
from seed_multimodal.data.nano.splits import split_of
from seed_multimodal.data.nano.sprites import check_files, load_sprites
from seed_multimodal.data.nano.things import THINGS
from seed_multimodal.errors import DataError


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
    (["noto", "blue", "large", ["tigger"], [1], 5], "no such scene"), (["noto", "blue"], "val 3: is no scene"),
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
    (copy / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="it has no list 'val'; build it with"):
        scenes("val", copy)
    (copy / "sprites.tar").write_bytes((copy / "sprites.tar").read_bytes()[:700_000])
    with pytest.raises(DataError, match=r"sprites\.tar"):
        load_sprites(copy)
    monkeypatch.setenv("SEED_NANO_DATA", str(copy))
    assert main(["check", "--samples", "1"]) == 2 and "sprites.tar: its sha256" in capsys.readouterr().err
    (copy / "sprites.tar").unlink()
    with pytest.raises(DataError, match=r"sprites\.tar"):
        load_sprites(copy)
