"""Runs of the extraction tools: shares, going on, refusals. Real tars of real jpegs, the nano tokenizer."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seed_multimodal.cli.data import extraction_parser, extraction_script
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.decode import TaskDecoder
from seed_multimodal.data.pretokenize.encode import EncoderSettings
from seed_multimodal.data.pretokenize.output import PartWriter
from seed_multimodal.data.pretokenize.run import RunSettings, run
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[4]
APP = ROOT / "MultiModalLLM"
TOOLS = sorted((APP / "src" / "tools").glob("extract_image_ids_to_torchdata_parallel*.py"))
SHARDS, SIZE = 8, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable) -> dict[str, Any]:
    """Eight tars of 24 pictures; in the fourth one is cut off, one is no picture and one has no text."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(SHARDS):
        samples = []
        for n in range(shard * SIZE, (shard + 1) * SIZE):
            members = {"jpg": jpeg(n), "txt": f"picture {n}".encode()}
            if n == 3 * SIZE + 5:
                members["jpg"] = members["jpg"][:-400]
            elif n == 3 * SIZE + 6:
                members["jpg"] = b"not a picture"
            elif n == 3 * SIZE + 9:
                del members["txt"]
            samples.append((f"{n:05d}", members))
        write_shard(folder / f"s-{shard:03d}.tar", samples)
    (folder / "data.yaml").write_text(f"files: {folder}\n")
    return {"files": str(folder)}


@pytest.fixture(scope="module")
def start(data: dict[str, Any]) -> Callable[..., int]:
    """`start(save_dir, **settings)`: run in this process (and those it spawns)."""

    def run_it(save_dir: Path, **settings: Any) -> int:
        return run(RunSettings(**{  # type: ignore[arg-type]
            "kind": "caption", "data": data, "save_dir": str(save_dir), "workers": 0, "batch_size": 10,
            "encoder": EncoderSettings(str(APP / "configs" / "tokenizer" / "nano.yaml"), device="cpu"), **settings}))

    return run_it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., int]) -> Path:
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parts(folder: Path) -> int:
    return len(list(folder.glob("part-*/manifest.json")))


# ---- one undisturbed run


def test_counts_names_and_hashes(whole, data):
    manifest = json.loads((whole / "manifest.json").read_text())
    total = SHARDS * SIZE
    assert (manifest["read"], manifest["samples"], manifest["bad"]) == (total, total - 3, 3)
    assert manifest["dropped"] == {}
    named = json.loads((whole / "part-0003" / "manifest.json").read_text())["bad_named"]
    assert "s-003.tar: sample 00077: " in named[0] and "truncated or damaged" in named[0]
    assert "s-003.tar: sample 00078: " in named[1]
    assert [part["folder"] for part in manifest["parts"]] == [f"part-{n:04d}" for n in range(SHARDS)]
    source = open_records(str(whole))
    assert len(source) == total - 3 and len({source.read(n).key for n in range(len(source))}) == total - 3
    assert source.read(1).where == f"{whole / 'part-0000' / '0000000.tar'}: sample 00000-s-000-0000001"
    assert not [name for name in content(whole) if ".tmp" in name]


def test_going_on_changes_nothing_and_repairs_what_differs(whole, start, tmp_path, capfd):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    assert start(copy) == 0 and content(copy) == content(whole)
    assert "8 of 8 units were finished" in capfd.readouterr().err
    tar = copy / "part-0001" / "0000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    (copy / "part-0002" / "manifest.json").write_text("{")
    (copy / "part-0004" / "0000000.tar").unlink()
    (copy / "part-0005" / ".0000003.tar.tmp").write_text("left by a killed run")
    (copy / "part-0005" / "manifest.json").unlink()
    assert start(copy) == 0 and content(copy) == content(whole)
    said = capfd.readouterr().err
    assert "part-0001/0000000.tar differs from its manifest; it is made again" in said and "4 of 8" in said


@pytest.mark.process
def test_workers_torchrun_and_job_arrays_make_the_same(whole, start, tmp_path, monkeypatch, capfd):
    assert start(tmp_path / "array", shard=(0, 2), workers=2) == 0
    assert "this share is finished" in capfd.readouterr().err and parts(tmp_path / "array") == 4
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert start(tmp_path / "array", shard=(1, 2)) == 0
    assert content(tmp_path / "array") == content(whole)


def test_small_tars_hold_the_same_records(whole, start, tmp_path):
    assert start(tmp_path / "out", limit=10, batch_size=7) == 0
    assert len(list((tmp_path / "out" / "part-0000").glob("*.tar"))) == 3
    several, one = open_records(str(tmp_path / "out")), open_records(str(whole))
    assert [several.read(n).fields for n in range(len(several))] == [one.read(n).fields for n in range(len(one))]


# ---- refused


def test_without_resume_an_existing_folder_is_refused(whole, start, tmp_path):
    with pytest.raises(DataError, match="earlier run's output"):
        start(whole, resume=False)
    with pytest.raises(DataError, match="earlier run's output"):
        start(whole, resume=False, shard=(1, 4))
    assert start(tmp_path / "new", resume=False, shard=(0, 8)) == 0
    assert start(tmp_path / "new", resume=False, shard=(1, 8)) == 0  # another job's part is there, not ours


def test_another_tokenizer_or_setting_is_refused(whole, start, tmp_path):
    import shutil

    from seed_multimodal.weights import load_state_dict, save_state_dict

    folder = tmp_path / "tokenizer"
    shutil.copytree(ROOT / "pretrained" / "nano" / "seed_tokenizer", folder,
                    ignore=shutil.ignore_patterns("diffusion_model"))
    state = load_state_dict(folder / "model.safetensors")
    state["query_tokens"] = state["query_tokens"] * 1.01
    save_state_dict(state, folder / "model.safetensors")
    node = {"_target_": "src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained",
            "pretrained_model_name_or_path": str(folder)}
    before = content(whole)
    with pytest.raises(DataError, match="begun with another tokenizer"):
        start(whole, encoder=EncoderSettings(node, device="cpu"))
    with pytest.raises(DataError, match=r"begun with other settings \(transform.interpolation: bilinear -> bicubic\);"):
        start(whole, image_transform=str(APP / "configs" / "processer" / "nano_transform.yaml"))
    with pytest.raises(ConfigError, match="224 x 224 pixels, but the tokenizer reads 64 x 64"):
        start(whole, image_transform=str(APP / "configs" / "processer" / "blip_transform.yaml"))
    with pytest.raises(DataError, match=r"begun with other settings \(kind: caption -> chat\);"):
        start(whole, kind="chat")
    assert content(whole) == before


def test_other_settings_are_refused_before_the_tokenizer_is_read(start: Callable[..., int], whole: Path) -> None:
    nowhere = EncoderSettings("nowhere.yaml", device="cpu")
    with pytest.raises(DataError, match=r"other settings \(input.similarity_thr: None -> 0.3; views: 1 -> 2\); choose"):
        start(whole, views=2, encoder=nowhere, input={"similarity_thr": 0.3})
    with pytest.raises(DataError, match=r"settings \(block: 10000 -> 5\); choose"):
        start(whole, block=5, gpus=2, encoder=nowhere)
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        start(whole, encoder=nowhere)


def test_changed_inputs(whole, start, tmp_path, data, capfd, jpeg):
    import shutil

    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(data["files"], tmp_path / "in")
    here = {"data": {"files": str(tmp_path / "in")}}
    write_shard(tmp_path / "in" / "s-001.tar", [("0", {"jpg": jpeg(1), "txt": b"changed"})])
    write_shard(tmp_path / "in" / "s-008.tar", [("0", {"jpg": jpeg(1), "txt": b"new"})])
    assert start(tmp_path / "out", **here) == 0
    assert "s-001.tar has changed" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [part["samples"] for part in manifest["parts"]] == [24, 1, 24, 21, 24, 24, 24, 24, 1]
    (tmp_path / "in" / "s-008.tar").unlink()
    with pytest.raises(DataError, match="part-0008, but there are only 8 units"):
        start(tmp_path / "out", **here)
    write_shard(tmp_path / "in" / "a-first.tar", [("0", {"jpg": jpeg(1), "txt": b"before all"})])
    with pytest.raises(DataError, match=r"holds s-000.tar .* is a-first.tar"):
        start(tmp_path / "out", **here)


def test_another_input_of_equal_size_is_made_again(start, tmp_path, capfd, jpeg):
    """Tars are padded to steps of 10 KiB, so that a new shard is easily as long as the old one."""
    for text in (b"before", b"behind"):
        write_shard(tmp_path / "in" / "s.tar", [("0", {"jpg": jpeg(1), "txt": text})])
        assert start(tmp_path / "out", data={"files": str(tmp_path / "in")}) == 0
    assert "s.tar has changed" in capfd.readouterr().err
    assert open_records(tmp_path / "out").read(0).fields["text"] == "behind"


@pytest.mark.parametrize("damage", ['{"tok', None])
def test_parts_of_unknown_settings_are_refused(whole, start, tmp_path, damage):
    """Else codes of two tokenizers, or of two transforms, would stand side by side."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "settings.json").unlink()
    if damage is not None:
        (copy / "settings.json").write_text(damage)
    before = content(copy)
    with pytest.raises(DataError, match="settings.json: is missing or damaged, so the settings"):
        start(copy, seed=1)
    assert content(copy) == before


def test_written_records_are_strict_json(start, tmp_path, jpeg):
    """Python writes NaN, which no other reader takes; LAION's metadata has it."""
    def refuse(word: str) -> None:
        raise AssertionError(word)

    write_shard(tmp_path / "in.tar", [("0", {"jpg": jpeg(1), "txt": b"words", "json":
                                             b'{"similarity": NaN, "deep": [{"a": Infinity}], "n": 1.5}'})])
    assert start(tmp_path / "out", data={"files": str(tmp_path / "in.tar")}) == 0
    with tarfile.open(tmp_path / "out" / "part-0000" / "0000000.tar") as tar:
        data = tar.extractfile(tar.getmembers()[0]).read()
    assert json.loads(data, parse_constant=refuse)["metadata"] == {"similarity": None, "deep": [{"a": None}], "n": 1.5}


def test_a_part_of_a_changed_input_is_not_finished(whole, start, tmp_path, data, jpeg):
    """A job array's share: the other share's part belongs to what stood there before."""
    import shutil

    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(data["files"], tmp_path / "in")
    (tmp_path / "out" / "manifest.json").unlink()
    write_shard(tmp_path / "in" / "s-001.tar", [("0", {"jpg": jpeg(1), "txt": b"changed"})])
    here = {"data": {"files": str(tmp_path / "in")}}
    assert start(tmp_path / "out", shard=(0, 2), **here) == 0 and not (tmp_path / "out" / "manifest.json").exists()
    assert start(tmp_path / "out", shard=(1, 2), **here) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == SHARDS * SIZE - 3 - SIZE + 1


def test_names_that_are_no_text(start, tmp_path, jpeg):
    """A member whose name is not UTF-8 is named in the manifest like any other, and read back the same."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for member, value in ((f"{name}.jpg", b"broken"), (f"{name}.txt", b"a"), ("1.jpg", jpeg(1)), ("1.txt", b"b")):
            info = tarfile.TarInfo(member)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    assert start(tmp_path / "out", data={"files": str(tmp_path / "in.tar")}) == 0
    manifest = json.loads((tmp_path / "out" / "part-0000" / "manifest.json").read_text("utf-8"))
    assert (manifest["samples"], manifest["bad"]) == (1, 1) and f"sample {name}: " in manifest["bad_named"][0]


FULL = """
import resource, sys
from pathlib import Path
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.data.pretokenize.output import PartWriter
from seed_multimodal.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    with PartWriter(Path(sys.argv[1]), Unit(0, "tar", "x.tar"), 1000) as writer:
        for number in range(int(sys.argv[2])):
            writer.add(number, {"text": "x" * 300})
        writer.finish({})
except DataError as error:
    print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("records", [19, 100])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, records):
    """A file that may not grow stands for a disk that is full: at the end of a tar, and in its midst."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), str(records)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert "part-0000: cannot be written" in done.stdout and done.returncode == 0, done.stderr
    assert list((tmp_path / "part-0000").iterdir()) == []


def test_many_broken_pictures_in_a_row_end_the_run(start, tmp_path, capfd, jpeg):
    for shard, bad in enumerate((2, 4)):
        write_shard(tmp_path / "in" / f"{shard}.tar", [
            (f"{n}", {"jpg": b"broken" if n < bad else jpeg(n), "txt": b"words"}) for n in range(6)])
    here = {"data": {"files": str(tmp_path / "in")}}
    with pytest.raises(DataError, match=r"1.tar: sample 2: .* \(3 broken samples in a row\)"):
        start(tmp_path / "out", max_bad=3, **here)
    assert parts(tmp_path / "out") == 1 and not list((tmp_path / "out" / "part-0001").iterdir())
    assert "skipped: " in capfd.readouterr().err
    assert start(tmp_path / "out", max_bad=5, **here) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad"] == 6


def test_a_run_that_could_use_nothing_does_not_end_well(start, tmp_path, capfd, jpeg):
    samples = [{"image": f"{n}.jpg", "caption": "words"} for n in range(7)]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    (tmp_path / "wrong").mkdir()
    here = {"data": {"files": str(tmp_path / "a.json"), "fields": {"caption": "caption"},
                     "image_root": str(tmp_path / "wrong")}}
    for _ in range(2):
        assert start(tmp_path / "out", **here) == 1
        said = capfd.readouterr().err
        assert "0 records" in said and "broken: 7" in said and "not one record was written" in said
    with pytest.raises(DataError, match="out: this folder holds no tar, jsonl"):
        open_records(tmp_path / "out")
    (tmp_path / "wrong" / "3.jpg").write_bytes(jpeg(3))
    assert start(tmp_path / "again", gpus=8, **here) == 0  # one unit of work: seven more would load a tokenizer each
    said = capfd.readouterr().err
    assert "broken: 6" in said and "; 1 of 1 process started here." in said


@pytest.mark.process
def test_a_decode_worker_that_dies_is_one_sentence(start, tmp_path, monkeypatch):
    monkeypatch.setattr(TaskDecoder, "__call__", lambda self, task: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"worker process \(pid \d+\) was killed by signal 9"):
        start(tmp_path / "out", workers=1)
    assert parts(tmp_path / "out") == 0 and not list((tmp_path / "out" / "part-0000").iterdir())


def test_two_runs_do_not_write_one_part(tmp_path):
    """The second one is refused while the first is at work, and takes its turn afterwards."""
    unit = Unit(0, "tar", "x.tar")
    with PartWriter(tmp_path, unit, 10) as first:
        first.add(0, {"text": "a"})
        with pytest.raises(DataError, match="another run is writing this part"), PartWriter(tmp_path, unit, 10):
            pass
        first.finish({})
    assert sorted(path.name for path in (tmp_path / "part-0000").iterdir()) == ["0000000.tar", "manifest.json"]
    with PartWriter(tmp_path, unit, 10) as second:
        second.finish({})


@pytest.mark.process
def test_a_refusal_in_a_process_is_the_exit_code(start, tmp_path, capfd):
    for shard in range(2):
        write_shard(tmp_path / "in" / f"{shard}.tar", [("0", {"jpg": b"broken", "txt": b"words"})])
    code = start(tmp_path / "out", max_bad=1, gpus=2, data={"files": str(tmp_path / "in")})
    said = capfd.readouterr().err
    assert code == 2 and said.count("not a picture") >= 2 and "2 of 2 processes failed" in said
    assert "Traceback" not in said


# ---- the commands


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "configs/none.yaml"], "no such configuration file"), (["--data", "none.yaml"], "none.yaml"),
    (["--save_dir", "n" * 300], "cannot be written (File name too long)"),
    (["--gpus", "0"], "at least 1"), (["--shard", "2/2"], "I from 0 to N-1"), (["--fields", "vqa"], "no preset")])
def test_wrong_flags_are_one_sentence(flags, message, data, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(APP)
    given = ["--tokenizer", "configs/tokenizer/nano.yaml", "--data", f"{data['files']}/data.yaml", "--save_dir",
             str(tmp_path / "out"), "--device", "cpu"]
    assert extraction_script("caption", "tool", "text", [*given, *flags]) == 2
    said = capfd.readouterr().err
    assert message in said and said.startswith("tool: ") or message in said.splitlines()[-1]


def test_released_flags_and_defaults():
    parser = extraction_parser("tool", "text")
    args = parser.parse_args(needed := ["--tokenizer", "t", "--data", "d", "--save_dir", "s"])
    original = {"image_processor": None, "image_transform": None, "tokenizer": "t", "data": "d", "save_dir": "s",
                "gpus": None, "batch_size": None, "num_workers": 4}
    assert {name: getattr(args, name) for name in original} == original
    assert args.resume is True and parser.parse_args([*needed, "--no-resume"]).resume is False
    for wrong in ([], [*needed, "--shard", "3"], [*needed, "--image_processor", "a", "--image_transform", "b"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_every_tool_names_its_kind():
    assert len(TOOLS) == 7
    kinds = {path.stem.removeprefix("extract_image_ids_to_torchdata_parallel").lstrip("_") or "caption"
             for path in TOOLS}
    assert all(f'extraction_script("{kind}", ' in path.read_text() for kind in kinds for path in TOOLS
               if path.stem.endswith(kind) or (kind == "caption" and path.stem.endswith("parallel")))
    assert kinds == {"caption", "qa", "video", "edit", "story", "interleaved", "chat"}
