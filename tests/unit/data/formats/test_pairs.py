"""Image-caption pairs: their samples, what names an unusable source, and filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import jpeg, write_tar

from seed_multimodal.data.formats.pairs import Pairs, open_pairs, shape_problem
from seed_multimodal.data.stream.loader import load
from seed_multimodal.errors import ConfigError, DataError


@pytest.mark.process
def test_pairs_in_forked_processes(shards: Path):
    # A data worker opens files again: positions of inherited handles are shared with its parent.
    pairs = Pairs(f"{shards}/*.tar")
    pairs.read(0)
    captions = load(lambda index: pairs.read(index).captions, range(40), workers=2)
    for index, read in enumerate(captions):
        assert read == pairs.read(index).captions == [f"Picture {index}."]


def test_pairs_of_lists(tmp_path):
    # Images are next to the list or below `image_root`; texts that are cut in an emoji are used.
    (tmp_path / "sub").mkdir()
    for name in ("0.jpg", "sub/1.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    rows = [
        {"image": "0.jpg", "caption": "one – eins"},
        {"image": f"{tmp_path}/sub/1.jpg", "caption": ["two", "cut \ud83d"]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/b.json").write_text(json.dumps(rows[:1]))
    for pairs in (
        Pairs(tmp_path / "a.json"),
        Pairs([tmp_path / "a.json", tmp_path / "lists/b.json"], image_root=tmp_path),
    ):
        read = [pairs.read(index) for index in range(len(pairs))]
        captions = [["one – eins"], ["two", "cut ?"], ["one – eins"]]
        assert [pair.captions for pair in read] == captions[: len(read)]
        images = [tmp_path / name for name in ("0.jpg", "sub/1.jpg", "0.jpg")]
        assert [pair.image for pair in read] == images[: len(read)]
    locations = ["a.json: item 0", "a.json: item 1", "lists/b.json: item 0"]
    assert [pair.location for pair in read] == [f"{tmp_path}/{name}" for name in locations]


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"__key__": "a", "jpg": jpeg(1), "json": {"captions": ["fine"]}}, "'captions'"),
        ({"__key__": "a", "txt": "words"}, "sample a"),
        ({"img": "0.jpg", "caption": "x"}, "item 0: .*'img'"),
    ],
)
def test_pairs_without_a_usable_sample(tmp_path, sample, named):
    # A wrong key ends a training at its start, with the keys that are there.
    if "__key__" in sample:
        path = write_tar(tmp_path / "x.tar", [sample])
    else:
        path = tmp_path / "x.json"
        path.write_text(json.dumps([sample]))
    with pytest.raises(DataError, match=f"^{path}: .*{named}"):
        Pairs(path)


def test_open_pairs_with_keys(tmp_path):
    # A list of other names is used without rewriting it.
    path = tmp_path / "a.json"
    path.write_text('[{"photo": "a.jpg", "title": "b"}]')
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    keys: dict[str, Any] = {"image_key": "photo", "caption_key": "title", "image_root": None}
    pair = open_pairs({"files": str(path), "format": "json", **keys}).read(0)
    assert (pair.image, pair.captions) == (tmp_path / "a.jpg", ["b"])
    for wrong, named in (({"format": "tarr", "files": "x"}, "tarr"), ({"file": "x"}, "'files'")):
        with pytest.raises(ConfigError, match=named):
            open_pairs(wrong)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((180, 180), ""),
        ((179, 200), "resolution"),
        ((1000, 666), ""),
        ((665, 1000), "aspect ratio"),
    ],
)
def test_shape_problem(size, reason):
    # At the thresholds, as in the original.
    assert shape_problem(size, 180, 0.666) == reason
    assert not shape_problem((2, 90), None, None)
