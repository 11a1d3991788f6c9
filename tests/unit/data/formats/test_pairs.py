"""Sources of image-caption pairs: their samples and error messages."""

from __future__ import annotations

import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_files import jpeg, write_tar
from omegaconf import OmegaConf

from seed_multimodal.data.formats.pairs import Pairs, open_pairs, shape_problem, similarity_problem
from seed_multimodal.errors import ConfigError, DataError


def test_pairs_of_shards_as_webdataset(shards: Path):
    pairs = Pairs(f"{shards}/s-{{000..003}}.tar")
    files = [str(p) for p in sorted(shards.glob("*.tar"))]
    expected = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert len(pairs) == len(expected) == 40 and pairs.shard_sizes.tolist() == [13, 7, 1, 19]
    for index in np.random.default_rng(0).permutation(40).tolist():
        pair = pairs.read(index)
        assert pair.key == pairs.key(index) == expected[index]["__key__"]
        assert pair.captions == [expected[index]["json"]["caption"]]
        raw = tarfile.open(pair.location.rpartition(": ")[0]).extractfile(f"{pair.key}.jpg")
        assert raw is not None and pair.image == raw.read()


def test_pairs_without_a_usable_sample(
    tmp_path,
):
    path = write_tar(
        tmp_path / "x.tar",
        [{"__key__": "a", "jpg": jpeg(1), "json": {"captions": ["fine", "too"]}}],
    )
    with pytest.raises(
        DataError, match=r"x\.tar: sample a: .*under key 'caption' \(did you mean 'captions'\?\)"
    ):
        Pairs(path)
    assert Pairs(path, caption_key="captions").read(0).captions == ["fine", "too"]
    path = write_tar(tmp_path / "y.tar", [{"__key__": "a", "txt": "words"}])
    with pytest.raises(DataError, match=r"y\.tar: sample a: has no image: no \.jpg, .* member"):
        Pairs(path)


@pytest.mark.process
def test_pairs_in_forked_processes(shards: Path):
    """A data worker closes inherited files: their positions are shared with its parent."""
    pairs = Pairs(f"{shards}/*.tar")
    pairs.read(0)
    handles = pairs._records.open_files._handles
    assert len(handles) == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_in_worker, (pairs, 15)) == ("00015", 1)
    assert pairs.read(1).key == "00001"


def _read_in_worker(pairs: Pairs, index: int) -> tuple[str, int]:
    return pairs.read(index).key, len(pairs._records.open_files._handles)


def test_pairs_of_lists(
    tmp_path,
):
    (tmp_path / "sub").mkdir()
    for name in ("0.jpg", "sub/1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    (tmp_path / "a.json").write_text(
        json.dumps(
            [
                {"image": "0.jpg", "caption": "one – eins"},
                {"image": "sub/1.jpg", "caption": ["two", "cut \ud83d"]},
            ]
        )
    )
    (tmp_path / "b.json").write_text(
        json.dumps([{"image": f"{tmp_path}/2.jpg", "caption": "three"}])
    )
    pairs = Pairs([tmp_path / "a.json", tmp_path / "b.json"], image_root=tmp_path)
    assert len(pairs) == 3
    assert [pairs.read(i).captions for i in range(3)] == [
        ["one – eins"],
        ["two", "cut ?"],
        ["three"],
    ]
    assert [pairs.read(i).image for i in range(3)] == [
        tmp_path / name for name in ("0.jpg", "sub/1.jpg", "2.jpg")
    ]
    assert (
        pairs.read(1).location == f"{tmp_path}/a.json: item 1"
        and pairs.read(2).location == f"{tmp_path}/b.json: item 0"
    )
    assert Pairs(tmp_path / "a.json").read(0).image == tmp_path / "0.jpg"  # next to the list


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"image": "0.jpg", "title": "x"}],
            "item 0: has no caption: .*'caption' .it has image, title",
        ),
        (
            [{"img": "0.jpg", "caption": "x"}],
            r"item 0: has no image: nothing under key 'image' \(did you mean 'img'\?\)",
        ),
        ([], "contains no record"),
    ],
)
def test_pairs_of_a_list_without_keys(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        Pairs(path)


def test_open_pairs(tmp_path, shards: Path):
    assert open_pairs({"files": f"{shards}/*.tar"}).read(0).captions == ["Picture 0."]
    assert (
        len(open_pairs(OmegaConf.create({"format": "tar", "files": [f"{shards}/s-001.tar"]}))) == 7
    )
    (tmp_path / "a.json").write_text('[{"photo": "a", "caption": "b"}]')
    spec = {
        "format": "json",
        "files": str(tmp_path / "a.json"),
        "image_key": "photo",
        "image_root": None,
    }
    assert isinstance(open_pairs(spec), Pairs)
    for spec, message in (
        ({"format": "tarr", "files": "x"}, "must be auto, tar, jsonl, json, parquet, folder, nano"),
        ({"format": "json", "file": "x"}, r"unknown key 'file' \(did you mean 'files'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_pairs(spec)


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
    assert not shape_problem((2, 90), None, None) and not shape_problem((2, 90), 0, 0.0)


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
    assert (similarity_problem(metadata, 0.2) == "") is passes and not similarity_problem(
        metadata, None
    )
