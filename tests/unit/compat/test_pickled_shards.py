"""The original pickled shards: read as data and converted; code in them is rejected, never run."""

from __future__ import annotations

import builtins
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

from seed_multimodal.compat import pickled_shards
from seed_multimodal.compat.pickled_shards import STAND_INS, convert_shards, read_pickle
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.errors import DataError

PLAIN = {
    "image_ids": [1, 2, 8191],
    "text": "Ein Bär",
    "metadata": {"similarity": 0.3, "ok": True, "none": None},
    "tuple": (1, ("a", -5)),
    "raw": "ü".encode(),
    "big": 2**60,
    "empty": [],
    "nested": [[1], [2]],
}
AS_JSON = PLAIN | {"tuple": [1, ["a", -5]], "raw": "ü"}


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_read_pickle_plain_values(protocol):
    assert read_pickle(pickle.dumps(PLAIN, protocol), "w") == AS_JSON
    odd = {"nan": float("nan"), "inf": float("-inf"), "shared": [PLAIN["image_ids"]] * 3}
    assert read_pickle(pickle.dumps(odd, protocol), "w") == {
        "nan": None,
        "inf": None,
        "shared": [[1, 2, 8191]] * 3,
    }


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["int64", ">i2", "uint8", "bool"])
def test_read_pickle_arrays(protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    value = {
        "a": array,
        "f": np.asfortranarray(array),
        "slice": array[::2, 1:],
        "n": array[1, 2],
        "none": array[:0],
        "list": [array[0], array[1]],
    }
    expected = {
        "a": array.tolist(),
        "f": array.tolist(),
        "slice": array[::2, 1:].tolist(),
        "n": array[1, 2].item(),
        "none": [],
        "list": array[:2].tolist(),
    }
    data = pickle.dumps(value, protocol)
    assert read_pickle(data, "w") == expected
    if protocol < 4:  # later protocols store the length of a name
        assert read_pickle(data.replace(b"numpy._core.", b"numpy.core."), "w") == expected, (
            "as numpy 1 wrote them"
        )


def hostile(trace: Path) -> dict[str, tuple[object, str]]:
    """Name → (object that writes `trace` when its pickle is run, global in the error message)."""
    command = f"touch {trace}"
    return {
        "os.system": (Calls(os.system, command), f"{os.name}.system"),
        "nested": ({"metadata": [{"deep": (1, Calls(os.system, command))}]}, f"{os.name}.system"),
        "eval": (
            {"a": Calls(builtins.eval, f"open({str(trace)!r}, 'w').close()")},
            "builtins.eval|__builtin__.eval",
        ),
        "as an array's numbers": (
            Calls(np.array([1]).__reduce__()[0], Calls(os.system, command)),
            f"{os.name}.system",
        ),
        "getattr": (
            Calls(getattr, Calls(__import__, "os"), "system"),
            "builtins.getattr|__builtin__.getattr",
        ),
        "class": ({"a": Path("x")}, "pathlib|copy_reg"),
        "object array": (
            {"a": np.array([Calls(os.system, command)], dtype=object)},
            "numpy type 'O8'|posix.system",
        ),
    }


@pytest.mark.parametrize("protocol", [3, 5])
@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_read_pickle_of_code(tmp_path, name, protocol):
    trace = tmp_path / "it_ran"
    value, named = hostile(trace)[name]
    data = pickle.dumps(value, protocol)
    with pytest.raises(
        BadRecord, match=rf"^old\.tar: sample 3: (refers to|contains an array of) .*({named})"
    ):
        read_pickle(data, "old.tar: sample 3")
    assert not trace.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch %s'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch %s'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.",  # STACK_GLOBAL
        # BUILD on a stand-in.
        b"cnumpy.core.multiarray\n_reconstruct\n}S'__call__'\ncos\nsystem\nsb.",
        b"cnumpy\nndarray\n(}(S'__setstate__'\ncos\nsystem\nstb.",  # slots of a stand-in
    ],
)
def test_read_pickle_of_programs(tmp_path, code):
    trace = tmp_path / "it_ran"
    with pytest.raises(BadRecord, match="refers to os.system"):
        read_pickle(code.replace(b"%s", str(trace).encode()), "w")
    assert not trace.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n}S'a'\nI1\nsb.",  # state of a stand-in
        b"cnumpy\nndarray\n(N}S'__setstate__'\nI1\nstb.",
        b"cnumpy\nndarray\n)\x81.",  # a stand-in is no class
        b"cnumpy\nndarray\n)R.",
        b"}cnumpy\nndarray\nI1\ns.",
        b"",
        b"\x80\x04]",
        b"hello",
        b"}r" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".",
        b"I" + b"9" * 5000 + b"\n.",
        pickle.dumps([1]),
        pickle.dumps("text"),
        pickle.dumps({1: 2}),
        pickle.dumps({"a": {(1,): 2}}),
        pickle.dumps({"a": b"\xff\xfe"}),
        pickle.dumps({"a": {1, 2}}),
        pickle.dumps({"a": np.zeros(2)}),
        pickle.dumps({"a": np.array(["a"])}),
        pickle.dumps({"a": 2**70}),
    ],
)
def test_read_pickle_broken(code):
    before = {name: type(stand_in).__dict__.keys() for name, stand_in in STAND_INS.items()}
    with pytest.raises(BadRecord, match=r"^a\.tar: sample 1[:.]") as caught:
        read_pickle(code, "a.tar: sample 1")
    assert "\n" not in str(caught.value)
    assert {name: type(stand_in).__dict__.keys() for name, stand_in in STAND_INS.items()} == before


def test_read_pickle_bombs(monkeypatch):
    monkeypatch.setattr(pickled_shards, "MAX_NODES", 200_000)
    bomb: list = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    loop: list = []
    loop.append(loop)
    arrays = [np.zeros(10_000, np.int64)] * 1000
    for value in (bomb, loop, arrays):
        started = time.process_time()
        with pytest.raises(BadRecord, match="has more than|recursion"):
            read_pickle(pickle.dumps({"a": value}), "w")
        assert time.process_time() - started < 5


# ---- whole shards


def old_shard(
    path: Path, start: int, count: int, extra: dict[str, bytes] | None = None
) -> list[dict]:
    """Write a shard as the original tool does; returns its records."""
    rng = np.random.default_rng(start)
    items = [
        {
            "image_ids": rng.integers(0, 8192, 32).tolist(),
            "text": f"text {n} ä",
            "metadata": {"n": n},
        }
        for n in range(start, start + count)
    ]
    records = [
        {**item, "image_ids": np.array(item["image_ids"])} if n % 2 else item
        for n, item in enumerate(items)
    ]
    write_shard(
        path,
        [
            (f"{n:08x}", {"pkl": pickle.dumps(item)} | (extra or {}))
            for n, item in enumerate(records)
        ],
    )
    return items


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "old"
    for part in range(3):
        old_shard(folder / f"part-{part:04d}" / "0000000.tar", 100 * part, 4 + part)
    return folder


def test_convert_shards(tmp_path, old):
    report = convert_shards([old], tmp_path / "new")
    assert (report.converted, report.existing, report.samples, report.refused) == (3, 0, 15, [])
    expected = [
        item
        for part in range(3)
        for item in old_shard(tmp_path / "scratch.tar", 100 * part, 4 + part)
    ]
    source = open_records(tmp_path / "new")
    assert [source.read(n).fields for n in range(len(source))] == expected
    assert source.read(4).key == "00000000"
    with tarfile.open(tmp_path / "new" / "part-0000" / "0000000.tar") as archive:
        assert archive.getnames() == [f"{n:08x}.json" for n in range(4)]
    old_shard(old / "part-0003" / "0000000.tar", 600, 2)
    report = convert_shards([old], tmp_path / "new")
    assert (report.converted, report.existing) == (1, 3), "only the new one"


@pytest.mark.process
def test_convert_shards_after_a_kill(tmp_path):
    """Finished files are whole, no process remains, and the same command resumes."""
    old = tmp_path / "old"
    new = tmp_path / "new"
    expected = [
        item for part in range(4) for item in old_shard(old / f"{part}.tar", 1000 * part, 400)
    ]
    (tmp_path / "run.py").write_text(
        "import sys; from seed_multimodal.compat.pickled_shards import convert_shards\n"
        "if __name__ == '__main__': convert_shards([sys.argv[1]], sys.argv[2], workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(old), str(new)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    while process.poll() is None and not list(new.glob(".*.tmp")):
        time.sleep(0.002)
    workers = [
        Path("/proc", process_id)
        for file in Path(f"/proc/{process.pid}/task").glob("*/children")
        for process_id in file.read_text().split()
    ]
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)
    assert all(len(open_records(path)) == 400 for path in new.glob("*.tar"))
    assert not convert_shards([old], new).refused
    source = open_records(new)
    assert [source.read(n).fields for n in range(len(source))] == expected and not list(
        new.glob(".*.tmp")
    )


def test_convert_shards_skips_samples_with_code(tmp_path, old):
    trace = tmp_path / "it_ran"
    bad = old / "part-0001" / "0000000.tar"
    write_shard(
        bad,
        [
            ("good", {"pkl": pickle.dumps({"text": "a"})}),
            ("evil", {"pkl": pickle.dumps(Calls(os.system, f"touch {trace}"))}),
        ],
    )
    report = convert_shards([old], tmp_path / "new")
    assert (report.converted, report.samples, report.refused) == (3, 11, []) and not trace.exists()
    assert (
        len(report.skipped) == 1
        and f"{bad}: sample evil.pkl: refers to {os.name}.system" in report.skipped[0]
    )


def test_convert_shards_of_torn_and_other_files(tmp_path, old):
    first = old / "part-0000" / "0000000.tar"
    first.write_bytes(first.read_bytes()[:1500])
    assert (
        "0000000.tar: torn or damaged in its first sample"
        in convert_shards([old], tmp_path / "a").refused[0]
    )
    with pytest.raises(DataError, match="contains the shards"):
        convert_shards([old], old)
    old_shard(tmp_path / "images.tar", 0, 2, {"jpg": b"image"})
    convert_shards([tmp_path / "images.tar"], tmp_path / "b")
    with tarfile.open(tmp_path / "b/images.tar") as archive:
        assert archive.getnames() == [
            "00000000.json",
            "00000000.jpg",
            "00000001.json",
            "00000001.jpg",
        ]
