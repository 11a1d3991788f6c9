"""Image-caption pairs: their samples, what names an unusable source, and filters."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data_files import jpeg, write_tar

from seed_multimodal.data.formats.pairs import Pairs, open_pairs, shape_problem, similarity_problem
from seed_multimodal.errors import ConfigError, DataError


def test_pairs_of_shards_as_webdataset(shards: Path):
    pairs = Pairs(f"{shards}/s-{{000..003}}.tar")
    files = sorted(map(str, shards.glob("*.tar")))
    expected = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert len(pairs) == len(expected) == 40
    assert pairs.shard_sizes.tolist() == [13, 7, 1, 19]
    for index in np.random.default_rng(0).permutation(40).tolist():
        pair = pairs.read(index)
        assert pair.key == pairs.key(index) == expected[index]["__key__"]
        assert pair.captions == [expected[index]["json"]["caption"]]
        shard = pair.location.rpartition(": ")[0]
        assert pair.image == tarfile.open(shard).extractfile(f"{pair.key}.jpg").read()


@pytest.mark.process
def test_pairs_in_forked_processes(shards: Path):
    # A data worker opens files again: positions of inherited handles are shared with its parent.
    pairs = Pairs(f"{shards}/*.tar")
    keys = [f"{index:05d}" for index in range(40)]
    pairs.read(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(_keys, (pairs,)) for _ in range(2)]
        assert _keys(pairs) == keys
        assert [result.get() for result in results] == [keys, keys]


def _keys(pairs: Pairs) -> list[str]:
    """Keys by the captions that are read."""
    captions = [pairs.read(index).captions[0] for index in range(len(pairs))]
    return [f"{int(caption.split()[1][:-1]):05d}" for caption in captions]


def test_pairs_of_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("0.jpg", "sub/1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    first = [
        {"image": "0.jpg", "caption": "one – eins"},
        {"image": "sub/1.jpg", "caption": ["two", "cut \ud83d"]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(first))
    second = [{"image": f"{tmp_path}/2.jpg", "caption": "three"}]
    (tmp_path / "b.json").write_text(json.dumps(second))
    pairs = Pairs([tmp_path / "a.json", tmp_path / "b.json"], image_root=tmp_path)
    read = [pairs.read(index) for index in range(len(pairs))]
    assert [pair.captions for pair in read] == [["one – eins"], ["two", "cut ?"], ["three"]]
    images = [tmp_path / name for name in ("0.jpg", "sub/1.jpg", "2.jpg")]
    assert [pair.image for pair in read] == images
    locations = ["a.json: item 0", "a.json: item 1", "b.json: item 0"]
    assert [pair.location for pair in read] == [f"{tmp_path}/{name}" for name in locations]
    # Images are next to the list.
    assert Pairs(tmp_path / "a.json").read(0).image == tmp_path / "0.jpg"


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        ({"__key__": "a", "jpg": jpeg(1), "json": {"captions": ["fine"]}}, "'captions'"),
        ({"__key__": "a", "txt": "words"}, "sample a"),
        ({"image": "0.jpg", "title": "x"}, "item 0: .*title"),
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
    path = tmp_path / "a.json"
    path.write_text('[{"photo": "a.jpg", "title": "b"}]')
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    keys: dict[str, Any] = {"image_key": "photo", "caption_key": "title", "image_root": None}
    pair = open_pairs({"files": str(path), "format": "json", **keys}).read(0)
    assert (pair.image, pair.captions) == (tmp_path / "a.jpg", ["b"])
    for wrong, named in (({"format": "tarr", "files": "x"}, "tarr"), ({"file": "x"}, "'files'")):
        with pytest.raises(ConfigError, match=named):
            open_pairs(wrong)


# ---- filters, at their thresholds


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((180, 180), ""),
        ((179, 200), "resolution"),
        ((1000, 666), ""),
        ((1000, 665), "aspect ratio"),
        ((665, 1000), "aspect ratio"),
        ((0, 0), "resolution"),
    ],
)
def test_shape_problem(size, reason):
    assert shape_problem(size, 180, 0.666) == reason
    assert not shape_problem((2, 90), None, None)
    assert not shape_problem((2, 90), 0, 0.0)


@pytest.mark.parametrize(
    ("metadata", "passes"),
    [
        ({}, True),
        ({"similarity": 0.2}, True),
        ({"similarity": 0.1999}, False),
        ({"SCORE": 0.4}, True),
        ({"score": 0.1, "SCORE": 0.4}, False),
        ({"all_similarities": [0.1, 0.3], "similarity": 0.1}, True),
    ],
)
def test_similarity_problem(metadata, passes):
    assert (similarity_problem(metadata, 0.2) == "") is passes
    assert not similarity_problem(metadata, None)
