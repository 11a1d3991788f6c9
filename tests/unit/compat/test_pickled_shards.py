"""The original pickled shards: read as data and converted; code in them is rejected, never run."""

import os
import pickle
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import fields_of

from seed_multimodal.compat import pickled_shards
from seed_multimodal.compat.pickled_shards import convert_shards, read_pickle
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
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

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_read_pickle_of_plain_values(protocol):
    assert read_pickle(pickle.dumps(PLAIN, protocol), "w") == AS_JSON
    odd = {"nan": float("nan"), "inf": float("-inf"), "shared": [PLAIN["image_ids"]] * 3}
    as_json = {"nan": None, "inf": None, "shared": [[1, 2, 8191]] * 3}
    assert read_pickle(pickle.dumps(odd, protocol), "w") == as_json


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["int64", ">i2", "uint8", "bool"])
def test_read_pickle_of_arrays(protocol, dtype):
    # The original's tools wrote codes as arrays, too.
    array = np.arange(12).reshape(3, 4).astype(dtype)
    arrays = [array, np.asfortranarray(array), array[::2, 1:], array[1, 2], array[:0]]
    value = {str(index): item for index, item in enumerate(arrays)}
    expected = {name: item.tolist() for name, item in value.items()}
    data = pickle.dumps(value, protocol)
    assert read_pickle(data, "w") == expected
    # As numpy 1 wrote them; later protocols store the length of a name.
    if protocol < 4:
        assert read_pickle(data.replace(b"numpy._core.", b"numpy.core."), "w") == expected


COMMAND = "touch it_ran"  # in the working directory
# Objects whose pickles would run code, and the global that the error must name.
HOSTILE = [
    (Calls(os.system, COMMAND), "system"),
    ({"metadata": [{"deep": (1, Calls(os.system, COMMAND))}]}, "system"),
    ({"a": Calls(eval, "open('it_ran', 'w').close()")}, "eval"),
    # The numbers of an array.
    (Calls(np.array([1]).__reduce__()[0], Calls(os.system, COMMAND)), "system"),
    (Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
    ({"a": Path("x")}, "pathlib|copy_reg"),
    ({"a": np.array([Calls(os.system, COMMAND)], dtype=object)}, "O8|system"),
]
# Programs by other opcodes: GLOBAL, INST, OBJ, STACK_GLOBAL, BUILD on an array and on its class.
PROGRAMS = [
    b"cos\nsystem\n(S'touch it_ran'\ntR.",
    b"(S'touch it_ran'\nios\nsystem\n.",
    b"(cos\nsystem\nS'touch it_ran'\no.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch it_ran\x85R.",
    b"cnumpy.core.multiarray\n_reconstruct\n}S'__call__'\ncos\nsystem\nsb.",
    b"cnumpy\nndarray\n(}(S'__setstate__'\ncos\nsystem\nstb.",
]
CODE = [(code, "system") for code in PROGRAMS] + [
    (pickle.dumps(value, protocol), named) for value, named in HOSTILE for protocol in (3, 5)
]


@pytest.mark.parametrize("code, named", CODE)
def test_read_pickle_of_code(code, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRecord, match=rf"old\.tar: sample 3: .*({named})"):
        read_pickle(code, "old.tar: sample 3")
    assert not [*tmp_path.iterdir()]


BROKEN = {
    "empty": b"",
    "no pickle": b"hello",
    "torn": b"\x80\x04]",
    "a class as a value": b"cnumpy\nndarray\n)\x81.",
    # Lengths of gigabytes, of which the file has nothing.
    "memo": b"}r" + struct.pack("<I", 2**32 - 1) + b".",
    "length": b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".",
    "digits": b"I" + b"9" * 5000 + b"\n.",
    # Values that JSON does not have.
    "list": pickle.dumps([1]),
    "keys": pickle.dumps({"a": {(1,): 2}}),
    "bytes": pickle.dumps({"a": b"\xff\xfe"}),
    "set": pickle.dumps({"a": {1, 2}}),
    "floats": pickle.dumps({"a": np.zeros(2)}),
    "integers": pickle.dumps({"a": 2**70}),
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_read_pickle_broken(code):
    with pytest.raises(BadRecord, match=r"^a\.tar: sample 1"):
        read_pickle(code, "a.tar: sample 1")
    # It has not changed how later records are read.
    good = pickle.dumps({"a": np.arange(3)})
    assert read_pickle(good, "w") == {"a": [0, 1, 2]}


def test_read_pickle_bombs(monkeypatch):
    # A file of some bytes may stand for values that fill the memory.
    monkeypatch.setattr(pickled_shards, "MAX_LENGTH", 1_000_000)
    bomb = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    loop = []
    loop.append(loop)
    arrays = [np.zeros(10_000, np.int64)] * 1000
    no_numbers = np.empty((1_000_000, 0), np.int64)
    for value in (bomb, loop, arrays, no_numbers):
        started = time.process_time()
        with pytest.raises(BadRecord):
            read_pickle(pickle.dumps({"a": value}), "w")
        assert time.process_time() - started < 5


# ---- whole shards


def old_shard(path, start: int, count, extra: dict[str, bytes] | None = None) -> list[dict]:
    """Write a shard as the original tool does; returns its records."""
    rng = np.random.default_rng(start)
    items = []
    samples = []
    for index in range(count):
        codes = rng.integers(0, 8192, 32)
        item = {"text": f"text {start + index} ä", "metadata": {"n": start + index}}
        items.append({**item, "image_ids": codes.tolist()})
        # Codes are lists or arrays.
        pickled = pickle.dumps({**item, "image_ids": codes} if index % 2 else items[-1])
        samples.append((f"{index:08x}", {"pkl": pickled} | (extra or {})))
    write_shard(path, samples)
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
    assert fields_of(source) == expected
    assert source.read(4).key == "00000000"
    old_shard(old / "part-0003" / "0000000.tar", 600, 2)
    report = convert_shards([old], tmp_path / "new")
    assert (report.converted, report.existing) == (1, 3), "only the new one"


def test_convert_shards_skips_samples_with_code(tmp_path, old):
    # One hostile sample does not keep the others from being converted.
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
    (skipped,) = report.skipped
    assert f"{bad}: sample evil.pkl" in skipped


def test_convert_shards_of_torn_and_other_files(tmp_path, old):
    first = old / "part-0000" / "0000000.tar"
    first.write_bytes(first.read_bytes()[:1500])
    (refused,) = convert_shards([old], tmp_path / "a").refused
    assert str(first) in refused
    with pytest.raises(DataError, match=str(old)):
        convert_shards([old], old)
    old_shard(tmp_path / "images.tar", 0, 2, {"jpg": b"image"})
    convert_shards([tmp_path / "images.tar"], tmp_path / "b")
    with tarfile.open(tmp_path / "b/images.tar") as archive:
        assert archive.getnames() == [
            f"0000000{n}.{kind}" for n in "01" for kind in ("json", "jpg")
        ]
