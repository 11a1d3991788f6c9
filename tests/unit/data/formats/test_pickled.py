"""The released pickled shards: read as data, converted once; code in them is refused and never run."""

from __future__ import annotations

import builtins
import collections
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from seed_multimodal.data.formats import pickled
from seed_multimodal.data.formats.convert import convert_shard, convert_shards
from seed_multimodal.data.formats.pickled import STAND_INS, read_pickle
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.disk import lock
from seed_multimodal.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[4]

PLAIN = {"image_ids": [1, 2, 8191], "text": "Ein Bär", "metadata": {"similarity": 0.3, "ok": True, "none": None},
         "tuple": (1, ("a", -5)), "raw": "ü".encode(), "big": 2**60, "empty": [], "nested": [[1], [2]]}
AS_JSON = PLAIN | {"tuple": [1, ["a", -5]], "raw": "ü"}


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol(protocol):
    assert read_pickle(pickle.dumps(PLAIN, protocol), "w") == AS_JSON
    odd = {"nan": float("nan"), "inf": float("-inf"), "shared": [PLAIN["image_ids"]] * 3}
    assert read_pickle(pickle.dumps(odd, protocol), "w") == {"nan": None, "inf": None, "shared": [[1, 2, 8191]] * 3}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", "int32", ">i2", "uint8", "<u4", "int8", "bool"])
def test_integer_arrays_become_lists(protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    value = {"a": array, "f": np.asfortranarray(array), "slice": array[::2, 1:], "n": array[1, 2], "none": array[:0],
             "scalar": np.array(7).astype(dtype), "list": [array[0], array[1]]}
    expected = {"a": array.tolist(), "f": array.tolist(), "slice": array[::2, 1:].tolist(), "n": array[1, 2].item(),
                "none": [], "scalar": np.array(7).astype(dtype).item(), "list": array[:2].tolist()}
    assert read_pickle(pickle.dumps(value, protocol), "w") == expected


def test_the_numpy_names_of_both_generations():
    """numpy 1 wrote numpy.core, numpy 2 writes numpy._core."""
    data = pickle.dumps({"a": np.arange(3)}, 2)
    old, new = data.replace(b"numpy._core.", b"numpy.core."), data.replace(b"numpy.core.", b"numpy._core.")
    assert old != new
    assert read_pickle(old, "w") == read_pickle(new, "w") == {"a": [0, 1, 2]}


def hostile(trace: Path) -> dict[str, tuple[object, str]]:
    """What would leave a trace if it were run, and the global that the refusal names."""
    command = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, command), f"{os.name}.system"),
        "nested": ({"metadata": [{"deep": (1, Calls(os.system, command))}]}, f"{os.name}.system"),
        "eval": ({"a": Calls(builtins.eval, code)}, "builtins.eval|__builtin__.eval"),
        "exec": (Calls(builtins.exec, code), "builtins.exec|__builtin__.exec"),
        "popen": (Calls(subprocess.Popen, ["touch", str(trace)]), "subprocess.Popen|commands.Popen"),
        "after good ones": ({"image_ids": np.arange(3), "x": Calls(os.system, command)}, f"{os.name}.system"),
        "as an array's numbers": (Calls(np.array([1]).__reduce__()[0], Calls(os.system, command)), f"{os.name}.system"),
        "getattr": (Calls(getattr, Calls(__import__, "os"), "system"), "builtins.getattr|__builtin__.getattr"),
        "partial": ({"a": collections.OrderedDict(a=1)}, "collections.OrderedDict"),
        "uuid": ({"a": uuid.UUID(int=5)}, "uuid.UUID|copy_reg._reconstructor"),
        "class": ({"a": Path("x")}, "pathlib|copy_reg"),
        "object array": ({"a": np.array([Calls(os.system, command)], dtype=object)}, "numpy type 'O8'|posix.system"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_code_is_refused_and_never_run(tmp_path, name, protocol):
    trace = tmp_path / "it_ran"
    value, named = hostile(trace)[name]
    data = pickle.dumps(value, protocol)
    with pytest.raises(BadRecord, match=rf"^old\.tar: sample 3: (asks for|holds an array of) .*({named})"):
        read_pickle(data, "old.tar: sample 3")
    assert not trace.exists()


@pytest.mark.parametrize("code", [
    b"cos\nsystem\n(S'touch %s'\ntR.",                       # GLOBAL, REDUCE
    b"(S'touch %s'\nios\nsystem\n.",                         # INST
    b"(cos\nsystem\nS'touch %s'\no.",                        # OBJ
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.",  # STACK_GLOBAL
    b"cnumpy.core.multiarray\n_reconstruct\n}S'__call__'\ncos\nsystem\nsb.",  # BUILD on a stand-in
    b"cnumpy\nndarray\n(}(S'__setstate__'\ncos\nsystem\nstb.",   # slots of a stand-in
])
def test_handwritten_programs(tmp_path, code):
    trace = tmp_path / "it_ran"
    with pytest.raises(BadRecord, match="asks for os.system"):
        read_pickle(code.replace(b"%s", str(trace).encode()), "w")
    assert not trace.exists()


@pytest.mark.parametrize("code", [
    b"cnumpy.core.multiarray\n_reconstruct\n}S'a'\nI1\nsb.",      # state of a stand-in
    b"cnumpy\nndarray\n(N}S'__setstate__'\nI1\nstb.",
    b"cnumpy\nndarray\n)\x81.",                                   # a stand-in is no class
    b"cnumpy\nndarray\n)R.",
    b"cnumpy\ndtype\nN\x85R.", b"cnumpy.core.multiarray\nscalar\n(I1\nI2\ntR.",
    b"c__builtin__\nbytes\n(I5\ntR.", b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.",
    b"cnumpy\nndarray\n.", b"}cnumpy\nndarray\nI1\ns.", b"Pother\n.", b"\x82\x01.", b"", b".", b"\x80\x04]", b"hello",
    b"(lp0\ng0\na0", b"\x80\x63.", b"}r" + struct.pack("<I", 2**32 - 1) + b".", b"]p99999999999\n.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".", b"\x8a" + b"\xff" * 20, b"I" + b"9" * 5000 + b"\n.",
    pickle.dumps([1]), pickle.dumps("text"), pickle.dumps({1: 2}), pickle.dumps({"a": {(1,): 2}}),
    pickle.dumps({"a": b"\xff\xfe"}), pickle.dumps({"a": {1, 2}}), pickle.dumps({"a": bytearray(b"a")}, 5),
    pickle.dumps({"a": 1 + 2j}), pickle.dumps({"a": np.zeros(2)}), pickle.dumps({"a": np.array(["a"])}),
    pickle.dumps({"a": np.float32(1)}), pickle.dumps({"a": 2**70}), pickle.dumps({"a": np.zeros(1, "datetime64[s]")}),
])
def test_what_is_broken_or_no_plain_value_is_one_sentence(code):
    before = {name: type(one).__dict__.keys() for name, one in STAND_INS.items()}
    with pytest.raises(BadRecord, match=r"^a\.tar: sample 1[:.]") as caught:
        read_pickle(code, "a.tar: sample 1")
    assert "\n" not in str(caught.value)
    assert {name: type(one).__dict__.keys() for name, one in STAND_INS.items()} == before


def test_small_pickles_of_enormous_things_are_refused_quickly(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_NODES", 200_000)
    bomb: list = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    loop: list = []
    loop.append(loop)
    many = [np.zeros(10_000, np.int64)] * 1000
    long = ["x" * 1_000_000] * 1000
    for value in (bomb, loop, many, long):
        started = time.process_time()
        with pytest.raises(BadRecord, match="is larger than|nested deeper"):
            read_pickle(pickle.dumps({"a": value}), "w")
        assert time.process_time() - started < 5


# ---- whole shards


def old_shard(path: Path, start: int, count: int, extra: dict[str, bytes] | None = None) -> list[dict]:
    """A shard as the released tool wrote it; gives what its samples mean."""
    rng = np.random.default_rng(start)
    items = [{"image_ids": rng.integers(0, 8192, 32).tolist(), "text": f"text {n} ä", "metadata": {"n": n}}
             for n in range(start, start + count)]
    written = [{**item, "image_ids": np.array(item["image_ids"])} if n % 2 else item for n, item in enumerate(items)]
    write_shard(path, [(f"{n:08x}", {"pkl": pickle.dumps(item)} | (extra or {})) for n, item in enumerate(written)])
    return items


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "old"
    for part in range(3):
        old_shard(folder / f"part-{part:04d}" / "0000000.tar", 100 * part, 4 + part)
    return folder


def test_shards_are_converted_with_their_keys(tmp_path, old):
    report = convert_shards([old], tmp_path / "new", progress=False)
    assert (report.converted, report.kept, report.samples, report.refused) == (3, 0, 15, [])
    expected = [item for part in range(3) for item in old_shard(tmp_path / "scratch.tar", 100 * part, 4 + part)]
    source = open_records(tmp_path / "new")
    assert [source.read(n).fields for n in range(len(source))] == expected
    assert source.read(4).key == "00000000"
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert [(one["name"], one["samples"]) for one in manifest["shards"]] == [
        (f"part-{part:04d}/0000000.tar", 4 + part) for part in range(3)]
    assert manifest["samples"] == 15
    with tarfile.open(tmp_path / "new" / "part-0000" / "0000000.tar") as archive:
        assert archive.getnames() == [f"{n:08x}.json" for n in range(4)]


@pytest.mark.process
def test_conversion_is_the_same_byte_for_byte_whatever_the_processes(tmp_path, old):
    convert_shards([old], tmp_path / "one", progress=False)
    convert_shards([str(old / "*" / "*.tar")], tmp_path / "two", workers=2, progress=False)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 4
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_a_second_run_converts_only_what_is_new_or_changed(tmp_path, old):
    new = tmp_path / "new"
    convert_shards([old], new, progress=False)
    times = {path: path.stat().st_mtime_ns for path in new.rglob("*.tar")}
    old_shard(old / "part-0001" / "0000000.tar", 500, 40)
    old_shard(old / "part-0003" / "0000000.tar", 600, 2)
    damaged = bytearray((new / "part-0002" / "0000000.tar").read_bytes())
    damaged[700] ^= 1  # as long as before
    (new / "part-0002" / "0000000.tar").write_bytes(damaged)
    report = convert_shards([old], new, progress=False)
    assert (report.converted, report.kept, report.samples) == (3, 1, 4 + 40 + 6 + 2)
    assert (new / "part-0000" / "0000000.tar").stat().st_mtime_ns == times[new / "part-0000" / "0000000.tar"]
    assert len(open_records(new)) == report.samples
    with pytest.raises(ConfigError, match=r"0000000\.tar: was made from .*part-0001.*, not from .*elsewhere"):
        old_shard(tmp_path / "elsewhere" / "part-0001" / "0000000.tar", 0, 1)
        convert_shards([tmp_path / "elsewhere"], new, progress=False)


@pytest.mark.process
def test_a_killed_conversion_goes_on(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    expected = [item for part in range(4) for item in old_shard(old / f"{part}.tar", 1000 * part, 400)]
    code = ("import sys; from seed_multimodal.data.formats.convert import convert_shards;"
            "convert_shards([sys.argv[1]], sys.argv[2], progress=False)")
    process = subprocess.Popen([sys.executable, "-c", code, str(old), str(new)],
                               env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    while process.poll() is None and not (new / "1.tar").exists() and not any(new.glob(".1.tar.*.tmp")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for whole in new.glob("*.tar"):  # what has its name is whole
        assert len(open_records(whole)) == 400
    report = convert_shards([old], new, progress=False)
    assert report.samples == 1600 and not report.refused
    source = open_records(new)
    assert [source.read(n).fields for n in range(len(source))] == expected
    assert not list(new.glob(".*.tmp"))


@pytest.mark.process
@pytest.mark.parametrize("killed", ["parent", "worker"])
def test_no_conversion_process_outlives_its_run(tmp_path, killed):
    for part in range(6):
        old_shard(tmp_path / "old" / f"{part}.tar", 10_000 * part, 3000)
    code = ("import sys; from seed_multimodal.data.formats.convert import convert_shards\n"
            "if __name__ == '__main__': convert_shards([sys.argv[1]], sys.argv[2], workers=2, progress=False)")
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "old"), str(tmp_path / "new")],
                               env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (scratch := list((tmp_path / "new").glob(".*.tmp"))):
        time.sleep(0.002)
    worker = int(scratch[0].name.split(".")[-3])
    os.kill(process.pid if killed == "parent" else worker, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert killed == "parent" or "a conversion process was killed" in said
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    assert convert_shards([tmp_path / "old"], tmp_path / "new", progress=False).samples == 18_000


def test_two_runs_do_not_convert_into_one_folder(tmp_path, old):
    (tmp_path / "new").mkdir()
    with lock(tmp_path / "new" / ".lock"), pytest.raises(DataError, match="new: another run is converting into this"):
        convert_shards([old], tmp_path / "new", progress=False)
    assert convert_shards([old], tmp_path / "new", progress=False).converted == 3
    assert not (tmp_path / "new" / ".lock").exists()


def test_a_refused_sample_keeps_its_shard_out_or_is_left_out(tmp_path, old):
    trace = tmp_path / "it_ran"
    bad = old / "part-0001" / "0000000.tar"
    write_shard(bad, [("good", {"pkl": pickle.dumps({"text": "a"})}),
                      ("evil", {"pkl": pickle.dumps(Calls(os.system, f"touch {trace}"))})])
    report = convert_shards([old], tmp_path / "new", progress=False)
    assert report.converted == 2 and len(report.refused) == 1
    assert f"{bad}: sample evil.pkl: asks for {os.name}.system" in report.refused[0]
    assert not (tmp_path / "new" / "part-0001" / "0000000.tar").exists()
    report = convert_shards([old], tmp_path / "new", skip_bad=True, progress=False)
    assert (report.converted, report.kept, report.samples) == (1, 2, 11)
    assert len(report.skipped) == 1 and "sample evil" in report.skipped[0]
    assert convert_shards([old], tmp_path / "new", progress=False).skipped == report.skipped  # still told later
    assert not trace.exists()


def test_other_troubles_are_one_sentence(tmp_path, old):
    first = old / "part-0000" / "0000000.tar"
    whole = first.read_bytes()
    (old / "part-0000" / "0000000.tar").write_bytes(whole[:1500])
    report = convert_shards([old], tmp_path / "a", progress=False)
    assert report.converted == 2 and "0000000.tar: torn or damaged in its first sample" in report.refused[0]
    first.write_bytes(whole)
    with pytest.raises(DataError, match="holds all the shards"):
        convert_shards([old], old, progress=False)
    convert_shards([old], old / "json", progress=False)
    assert convert_shards([old], old / "json", progress=False).kept == 3  # its own output is no input
    write_shard(tmp_path / "both.tar", [("k", {"pkl": pickle.dumps({"a": 1}), "json": b"{}"})])
    with pytest.raises(DataError, match="sample k: has json, pkl; one .pkl member was expected"):
        convert_shard(tmp_path / "both.tar", tmp_path / "out.tar", "both.tar")
    assert not list(tmp_path.glob("*out.tar*"))
    items = old_shard(tmp_path / "pictures.tar", 0, 2, {"jpg": b"picture"})
    convert_shard(tmp_path / "pictures.tar", tmp_path / "out.tar", "x.tar")
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert archive.getnames() == ["00000000.json", "00000000.jpg", "00000001.json", "00000001.jpg"]
        stream = archive.extractfile("00000001.json")
        assert stream is not None and json.load(io.TextIOWrapper(stream)) == items[1]
    (tmp_path / "b" / "manifest.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read \(Is a directory\)"):
        convert_shards([old], tmp_path / "b", progress=False)
    (tmp_path / "a" / "manifest.json").write_text('{"shards": [1]}')
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of converted shards"):
        convert_shards([old], tmp_path / "a", progress=False)
