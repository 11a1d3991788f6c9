"""Indexes are made once per file, by one process of a machine, in parallel, and belong to the file as it is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seed_multimodal.data.formats import index_file, index_store, json_lines
from seed_multimodal.data.formats.index_file import read_index, stamp_of
from seed_multimodal.data.formats.index_store import FOLDER, IndexStore
from seed_multimodal.data.formats.records import FileRecords, open_records
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.errors import DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

COUNT = 300


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same records as tars, lines (some blank), a list and a table; all large enough to keep an index beside."""
    monkeypatch.setattr(index_store, "KEEP_FROM", 1)
    monkeypatch.setattr(index_file, "MAP_FROM", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [f"record {number} " + "x" * (number % 7) for number in range(COUNT)]
    for part in range(3):
        write_shard(folder / f"{part}.tar", [(f"{part}-{number}", {"json": json.dumps({"text": text}).encode()})
                                             for number, text in enumerate(texts[part::3])])
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "x.jsonl").write_text("\n".join(line + "\n" * (number % 50 == 7) for number, line in enumerate(lines)))
    (folder / "x.json").write_text("[" + ",\n".join(lines) + "]")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "x.parquet", row_group_size=70)
    return folder


def texts_of(source: FileRecords) -> list[str]:
    return [source.read(index).fields["text"] for index in range(len(source))]


def opened(data: Path, kind: str, **options: Path) -> FileRecords:
    return open_records(str(data / f"*.{kind}"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tar", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_file_is_indexed_once(data: Path, kind: str, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = data / FOLDER if beside else data.parent / "index"
    options = {} if beside else {"index_folder": place}
    first = opened(data, kind, **options)
    texts, where = texts_of(first), [first.locate(index).where for index in range(COUNT)]
    assert len(texts) == COUNT and len(set(texts)) == COUNT
    assert len(list(place.iterdir())) == len(first.files), "an index for each file, and nothing else"
    shards = first.shard_sizes.tolist()

    def never(*_: object) -> None:
        raise AssertionError("the file is read again")

    for reader in (type(part) for part in first.parts):
        monkeypatch.setattr(reader, "scans", never)
    again = opened(data, kind, **options)
    assert texts_of(again) == texts and again.shard_sizes.tolist() == shards
    assert [again.locate(index).where for index in range(COUNT)] == where
    assert not any(array.flags.writeable or array.flags.owndata for part in again.parts
                   for array in part.arrays.values() if len(array))  # type: ignore[attr-defined]
    sent = pickle.dumps(again.parts[0])  # to a worker that is spawned: the index is mapped there
    arrived = pickle.loads(sent)  # noqa: S301  (made here)
    assert len(sent) < 1000 and len(arrived.arrays) == len(again.parts[0].arrays)  # type: ignore[attr-defined]


@pytest.mark.parametrize("harm", ["torn", "empty", "longer", "words", "foreign", "version", "other kind"])
def test_an_index_that_is_torn_or_foreign_is_made_anew(data: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of(opened(data, "jsonl"))
    (kept,) = (data / FOLDER).iterdir()
    whole = kept.read_bytes()
    if harm == "foreign":
        (data.parent / "x.jsonl").write_text('{"text": "other"}\n' * 5)
        assert len(open_records(str(data.parent / "x.jsonl"))) == 5
        kept.write_bytes((data.parent / FOLDER / kept.name).read_bytes())
    elif harm == "version":
        kept.write_bytes(whole.replace(b'"version": 1', b'"version": 2'))
    elif harm == "other kind":
        index_file.write_index(kept, stamp_of(data / "x.jsonl"), "tar", {"starts": np.zeros(3, np.int64)})
    else:
        kept.write_bytes({"torn": whole[:-70], "empty": b"", "longer": whole + b"\0", "words": b"seed index no"}[harm])
    assert read_index(kept, stamp_of(data / "x.jsonl"), "jsonl") is None
    assert texts_of(opened(data, "jsonl")) == texts
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("kind", ["tar", "jsonl", "json", "parquet"])
def test_a_file_that_changed_is_indexed_again(data: Path, kind: str) -> None:
    source = opened(data, kind)
    assert len(source) == COUNT
    file = source.files[0]
    if kind == "tar":
        write_shard(file, [("new", {"json": b'{"text": "new"}'})])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["new"]}), file)
    else:
        file.write_text('{"text": "new"}\n' if kind == "jsonl" else '[{"text": "new"}]')
    renewed = opened(data, kind)
    assert renewed.read(0).fields["text"] == "new" and len(renewed) == (COUNT * 2 // 3 + 1 if kind == "tar" else 1)
    assert len(list((data / FOLDER).iterdir())) == len(source.files), "the old one is replaced"
    # of the same size, a moment later
    before = file.stat()
    content = file.read_bytes().replace(b'"new"', b'"old"')
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert kind == "parquet" or opened(data, kind).read(0).fields["text"] == "old"


def test_folders_that_cannot_be_written_are_indexed_in_memory_with_a_sentence(
    data: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / FOLDER).write_text("a file stands where the folder would be")  # root may write anywhere else
    assert len(texts_of(opened(data, "tar"))) == COUNT
    said = capsys.readouterr().err
    assert f"{data / FOLDER}: the index of 3 files cannot be kept beside the data (" in said
    assert said.count("\n") == 1 and "name an index_folder" in said
    monkeypatch.setenv("RANK", "1")
    assert len(opened(data, "tar")) == COUNT and not capsys.readouterr().err, "said once, by the first process"
    instead = data.parent / "instead"
    files = FileRecords(list(opened(data, "tar").parts), store=IndexStore(instead=instead))
    for part in files.parts:
        part._arrays = None  # type: ignore[attr-defined]
    assert len(files) == COUNT and len(list(instead.iterdir())) == 3
    with pytest.raises(DataError, match=r"the index of a data file cannot be written there \(File exists\)"):
        len(opened(data, "tar", index_folder=data / FOLDER))


@pytest.mark.parametrize("kind", ["tar", "jsonl", "json", "parquet"])
def test_a_file_that_changes_on_the_way_to_a_worker_is_a_sentence(data: Path, kind: str) -> None:
    """Not another numbering of its records, nor an index out of range."""
    source = opened(data, kind)
    assert len(source) == COUNT
    sent = pickle.dumps(source)
    for file in source.files:
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["new"]}), file)
        elif kind == "tar":
            write_shard(file, [("new", {"json": b"{}"})])
        else:
            file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="(has changed since|has fewer rows than when) it was indexed; do not change"):
        pickle.loads(sent).read(COUNT - 1)  # noqa: S301  (made here)


def test_names_as_long_as_they_can_be(data: Path) -> None:
    names = ["x" * 249 + ending for ending in ("a", "b")]  # alike but for their ends
    for count, name in enumerate(names, 5):
        (data / f"{name}.json").write_text('{"text": "a"}\n' * count)
    for options in ({}, {"index_folder": data / "index"}):
        for _ in range(2):
            assert [len(open_records(data / f"{name}.json", **options)) for name in names] == [5, 6]
    assert len(list((data / FOLDER).iterdir())) == len(list((data / "index").iterdir())) == 2


def test_small_files_leave_no_index_beside_the_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for kind in ("tar", "jsonl", "json", "parquet"):
        assert len(opened(data, kind)) == COUNT
    assert not (data / FOLDER).exists()
    assert IndexStore("").folder is None  # an empty setting is not the folder that happens to be the current one


@pytest.mark.parametrize("chunk", [1, 50, 1000, 100_000])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n \n"])
def test_pieces_of_a_file_of_lines_are_the_whole(data: Path, chunk: int, ending: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    file = data / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" * (chunk == 50) + file.read_bytes() + ending.encode())
    starts, ends, numbers = json_lines.index_lines(file)
    monkeypatch.setattr(json_lines, "CHUNK", chunk)
    part = json_lines.JsonFile(file, lines=True)
    assert len(part.scans()) > 1 or chunk == 100_000
    assert part.arrays["starts"].tolist() == starts.tolist()
    assert (part.arrays["starts"] + part.arrays["lengths"]).tolist() == ends.tolist()
    assert part.arrays["numbers"].tolist() == numbers.tolist()
    assert part.arrays["lengths"].dtype == np.uint32


@pytest.mark.process
@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_several_processes_make_it(data: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = texts_of(opened(data, kind))
    for kept in (data / FOLDER).iterdir():
        kept.unlink()
    monkeypatch.setattr(index_store, "PARALLEL_FROM", 1)
    monkeypatch.setattr(json_lines, "CHUNK", 2000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    used: list[int] = []
    results = index_store._results
    monkeypatch.setattr(index_store, "_results", lambda jobs, size: (used.append(len(jobs)), results(jobs, size))[1])
    assert texts_of(opened(data, kind)) == alone
    assert used[0] > 2 and len(list((data / FOLDER).iterdir())) == (3 if kind == "tar" else 1)
    # a broken file is its own sentence, from a helper, too, and the others keep what was made
    (data / "0.tar").write_bytes(b"\x1f\x8b" + b"x" * 3000)
    if kind == "tar":
        with pytest.raises(DataError, match=r"0\.tar: compressed shards cannot be read"):
            len(opened(data, kind))


UNGUARDED = """
import os, sys
from seed_multimodal.data.formats import index_store, records
index_store.KEEP_FROM = index_store.PARALLEL_FROM = 1
os.sched_getaffinity = lambda _: {0, 1}
print(len(records.open_records(sys.argv[1] + "/*.tar")))
"""


@pytest.mark.process
def test_a_script_without_a_guard_is_not_run_again_by_the_helpers(data: Path) -> None:
    """Each would wait for the lock that its parent holds while that waits for it."""
    script = data.parent / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, str(script), str(data)], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{COUNT}\n"), done.stderr
    assert len(list((data / FOLDER).iterdir())) == 3


RANK = """
import os, sys, time
from pathlib import Path
from seed_multimodal.data.formats import index_store, records
index_store.KEEP_FROM = 1
folder = Path(sys.argv[1])
scan = records.JsonTar.scans
def slow(self):
    with open(folder.parent / "scanned", "a") as file:
        file.write(f"{self.path.name} {os.getpid()}\\n")
    time.sleep(0.5)
    return scan(self)
records.JsonTar.scans = slow
source = records.open_records(str(folder / "*.tar"))
print(len(source), source.read(200).fields["text"])
"""


@pytest.mark.process
def test_of_several_processes_one_makes_it_and_the_others_wait(data: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(data)], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env={**os.environ, "RANK": str(rank)}) for rank in range(3)]
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1 and said[0][0].startswith(f"{COUNT} record ")
    scanned = (data.parent / "scanned").read_text().split()
    assert sorted(scanned[::2]) == ["0.tar", "1.tar", "2.tar"] and len(set(scanned[1::2])) == 1, scanned
    assert len(list((data / FOLDER).iterdir())) == 3, "no lock is left"


def test_a_mixtures_index_folder(data: Path, words: MultimodalTokenizer) -> None:
    sources = [{"name": kind, "files": str(data / f"*.{kind}"), "decoder": "pretrain.text"}
               for kind in ("tar", "jsonl", "json", "parquet")]
    settings = read_data_settings({"sources": sources, "index_folder": str(data.parent / "index")})
    mixture = Mixture(settings, words)
    assert mixture.sizes == [COUNT] * 4 and not (data / FOLDER).exists()
    kept = list((data.parent / "index").iterdir())
    assert len(kept) == 6 and {one.suffix for one in kept} == {".idx"}
    assert all("record" in words.decode(mixture.sequence(source, 5)[0].ids) for source in range(4))  # type: ignore[index]
