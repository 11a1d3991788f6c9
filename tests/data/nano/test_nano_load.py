"""The committed shard, and what the loader says about damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from seed_multimodal.data.formats.tar import tar_records
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.nano import NanoSet, load_nano
from seed_multimodal.data.nano.check import check_folder
from seed_multimodal.errors import DataError

FOLDER = Path(__file__).resolve().parents[3] / "data" / "nano64"


@pytest.fixture(scope="module")
def nano() -> NanoSet:
    return load_nano(FOLDER)


@pytest.mark.slow
def test_committed_set_is_whole(nano: NanoSet) -> None:
    counts = nano.manifest["counts"]
    assert len(nano) == nano.manifest["records"] == sum(counts["pictures"].values()) > 5000
    assert nano.images().shape == (len(nano), 64, 64, 3) and nano.images().dtype == np.uint8
    for split, number in counts["pictures"].items():
        assert len(nano.split(split)) == number > 200
    assert {r.style for r in nano.records} == {"twemoji", "noto", "fluent"}
    assert nano.images() is nano.images()
    key = nano.records[100].key
    assert np.array_equal(np.asarray(nano.image(key)), nano.images()[nano.index[key]])
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 9_000_000


@pytest.mark.slow
def test_committed_set_leaks_nothing() -> None:
    assert check_folder(FOLDER) == []


def test_committed_splits_are_disjoint(nano: NanoSet) -> None:
    """Said again without the check's code: labels, families and pixels of unseen families are not in train."""
    sides = {s: [nano.records[i] for i in nano.split(s)] for s in ("train", "val", "test_concept", "test_combo")}
    for split in ("val", "test_concept"):
        for other in set(sides) - {split}:
            assert not {r.label for r in sides[split]} & {r.label for r in sides[other]}
            assert not {r.family for r in sides[split]} & {r.family for r in sides[other]}
    train_pairs = {(r.label, r.style) for r in sides["train"]}
    assert not train_pairs & {(r.label, r.style) for r in sides["test_combo"]}
    assert {r.label for r in sides["test_combo"]} <= {r.label for r in sides["train"]}
    assert len({image.tobytes() for image in nano.images()}) == len(nano)
    train_keys = {r.key for r in sides["train"]}
    for edit in nano.edits:
        assert edit.split != "train" or {edit.source, edit.target} <= train_keys
    for conversation in nano.conversations:
        assert conversation.split != "train" or set(conversation.keys) <= train_keys


def test_committed_words(nano: NanoSet) -> None:
    for record in nano.records:
        assert record.label == record.captions[1] == record.label.lower()
        first = record.captions[0]
        assert first.startswith(f"a {record.style} drawing of ") and first.endswith(record.label)
        assert len(record.captions) >= 5
        answers = {qa.kind: qa.answer for qa in record.qa if qa.kind != "yesno"}
        assert answers["thing"] == record.label and answers["style"] == record.style
        assert sorted(qa.answer for qa in record.qa if qa.kind == "yesno") == ["no", "yes"]
        assert all(qa.answer.isascii() and qa.answer == qa.answer.lower() for qa in record.qa)
    assert nano.records[nano.index["noto-1f436"]].captions[0] == "a noto drawing of a dog face"


def test_committed_edits_and_conversations(nano: NanoSet) -> None:
    by_key = {r.key: r for r in nano.records}
    for edit in nano.edits:
        source, target = by_key[edit.source], by_key[edit.target]
        if edit.kind == "style":
            assert source.code == target.code and source.style != target.style and target.style in edit.instruction
        elif edit.kind == "person":
            assert source.style == target.style and source.family == target.family and source.gender != target.gender
        else:
            assert edit.kind == "swap" and source.style == target.style and target.label in edit.instruction
    for conversation in nano.conversations:
        roles = [m["role"] for m in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 4 <= len(roles) <= 8
        assert conversation.keys
    answers = [m["content"] for c in nano.conversations for m in c.messages if m["role"] == "assistant"]
    assert sum(any(isinstance(part, dict) for part in answer) for answer in answers) > 1000


def test_webdataset_library_reads_the_shard(nano: NanoSet) -> None:
    import webdataset
    shard = next(FOLDER.glob("*.tar.gz"))
    first = next(iter(webdataset.WebDataset(str(shard), shardshuffle=False)))
    record = nano.records[nano.index[first["__key__"]]]
    assert json.loads(first["json"])["label"] == record.label and first["webp"][:4] == b"RIFF"


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, nano: NanoSet) -> Path:
    """Six real samples as a set of their own, with no edits or conversations."""
    folder = tmp_path / "small"
    folder.mkdir()
    samples = [s for s, _ in zip(tar_records(next(FOLDER.glob("*.tar.gz")), unpack=True), range(6), strict=False)]
    write_shard(folder / "nano64-000000.tar", ((s.key, s.members) for s in samples))
    for name in ("edits.jsonl.gz", "conversations.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(b""))
    manifest = {"size": 64, "records": 6, "files": {"nano64-000000.tar": {}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def members(folder: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(folder / "nano64-000000.tar") as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def write(folder: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(folder / "nano64-000000.tar", "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path) -> None:
    monkeypatch.setenv("SEED_NANO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="data.nano build"):
        load_nano()
    monkeypatch.setenv("SEED_NANO_DATA", str(small))
    assert len(load_nano()) == 6


def test_small_set_loads(small: Path) -> None:
    assert len(load_nano(small)) == 6


def test_torn_shard_is_named(small: Path) -> None:
    shard = small / "nano64-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"000000\.tar: torn or damaged in its first sample \(its end is missing\)"):
        load_nano(small)


def test_torn_gzip_shard_is_named(small: Path) -> None:
    shard = small / "nano64-000000.tar"
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["files"] = {"nano64-000000.tar.gz": {}}
    (small / "manifest.json").write_text(json.dumps(manifest))
    packed = gzip.compress(shard.read_bytes())
    other = bytearray(packed)
    other[len(packed) // 2] ^= 255
    for broken in (packed[:len(packed) // 2], bytes(other), packed[:-4]):
        (small / "nano64-000000.tar.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"nano64-000000\.tar\.gz: torn or damaged"):
            load_nano(small)


def test_shard_cut_between_samples_is_noticed(small: Path) -> None:
    write(small, members(small)[:8])
    with pytest.raises(DataError, match="hold 4 samples, the manifest says 6"):
        load_nano(small)


def test_sample_without_json_is_named(small: Path) -> None:
    files = members(small)
    gone = next(name for name, _ in files if name.endswith(".json"))
    write(small, [f for f in files if f[0] != gone])
    with pytest.raises(DataError, match=rf"nano64-000000\.tar: sample {gone[:-5]}: has no \.json member"):
        load_nano(small)


def test_missing_key_and_bad_json_are_named(small: Path) -> None:
    files = members(small)
    place = next(i for i, (name, _) in enumerate(files) if name.endswith(".json"))
    name, data = files[place]
    value = json.loads(data)
    del value["label"]
    write(small, [*files[:place], (name, json.dumps(value).encode()), *files[place + 1:]])
    with pytest.raises(DataError, match=rf"{name[:-5]}: its \.json member has no key 'label'"):
        load_nano(small)
    write(small, [*files[:place], (name, data[:40]), *files[place + 1:]])
    with pytest.raises(DataError, match=rf"{name[:-5]}: is not json"):
        load_nano(small)


def test_broken_picture_is_named(small: Path) -> None:
    files = [(name, data[:60] if i == 0 else data) for i, (name, data) in enumerate(members(small))]
    write(small, files)
    with pytest.raises(DataError, match=rf"{files[0][0][:-5]}: its picture cannot be decoded"):
        load_nano(small).images()


def test_duplicates_and_missing_shards_are_named(small: Path) -> None:
    write(small, [("a.webp", b"x"), ("a.webp", b"y")])
    with pytest.raises(DataError, match=r"nano64-000000\.tar: sample a has two \.webp members"):
        load_nano(small)
    (small / "nano64-000000.tar").unlink()
    with pytest.raises(DataError, match=r"nano64-000000\.tar: cannot be opened"):
        load_nano(small)


def test_edit_of_an_unknown_picture_is_refused(small: Path) -> None:
    row = json.dumps(["noto-1", "noto-2", "Make it.", "Here it is.", "style", "train"])
    (small / "edits.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    with pytest.raises(DataError, match="names picture 'noto-[12]', which no shard holds"):
        load_nano(small)
    (small / "edits.jsonl.gz").write_bytes(gzip.compress(b"[1"))
    with pytest.raises(DataError, match="edits.jsonl.gz line 1: not JSON"):
        load_nano(small)
