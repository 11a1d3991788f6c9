"""`seed data check` and `seed data convert` as they are typed."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from seed_multimodal.cli.main import main
from seed_multimodal.data.formats.shards import write_shard
from seed_nano.world.scene import find_world

ROOT = Path(__file__).resolve().parents[4]
NANO_WORDS = ROOT / "pretrained" / "nano" / "seed_tokenizer"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def old(tmp_path) -> Path:
    """Two pickled shards as the original wrote them."""
    for shard in range(2):
        write_shard(tmp_path / "old" / f"{shard:07d}.tar", [
            (f"{shard}{n}", {"pkl": pickle.dumps({"image_ids": list(range(n, n + 32)), "text": f"picture {n}"})})
            for n in range(3)])
    return tmp_path / "old"


def test_old_shards_are_refused_converted_and_then_pass(capsys, tmp_path, old):
    code, out, _ = run(capsys, "check", old)
    assert code == 1 and f"seed data convert {old}/0000000.tar --out" in out
    new = tmp_path / "new"
    code, out, err = run(capsys, "convert", old, "--out", new)
    assert code == 0 and err == ""
    assert out == f"{new}: 2 shards converted, 0 already done, 0 refused; 6 samples, 0 left out\n"
    assert "0 shards converted, 2 already done" in run(capsys, "convert", old, "--out", new)[1]
    code, out, _ = run(capsys, "check", new, "--tokenizer", NANO_WORDS)
    assert code == 0 and "2 files, 6 records, 6 images\n  pretrain.caption: 6\ntokens of a record: median" in out
    assert out.endswith("nothing wrong\n")
    code, out, _ = run(capsys, "convert", old, "--out", new, "--force", "--json")
    assert code == 0 and json.loads(out) == {"out": str(new), "converted": 2, "kept": 0, "samples": 6, "refused": [],
                                             "skipped": []}


def test_control_words_are_a_warning(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one</s>two"}\n{"text": "plain"}\n')
    code, out, _ = run(capsys, "check", path, "--tokenizer", NANO_WORDS)
    assert code == 0 and out.endswith(
        f"warning: 1 record holds control words in the text, which become real tokens in training: </s> 1 ({path}: "
        "line 1: </s> in 'text').\nnothing wrong\n")


def test_what_is_wrong_is_printed_and_counted(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good words"}\n{"text": \n{"image_ids": [1], "text": "a"}\n' + '{"text": ""}\n' * 5)
    code, out, _ = run(capsys, "check", path, "--tokenizer", NANO_WORDS, "--length", 2, "--max-errors", 3)
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith(f"too long: {path}: line 1: has ")
    assert lines[1].startswith(f"malformed json: {path}: line 2: is not json")
    assert lines[2] == f"number of codes: {path}: line 3: image_ids: has 1 codes; a picture has 32."
    assert lines[3] == "… and 5 more (--max-errors 0 shows all)"
    assert lines[-1] == "8 errors: empty text 5, too long 1, malformed json 1, number of codes 1"
    code, out, _ = run(capsys, "check", path, "--json", "--max-errors", 0)
    report = json.loads(out)
    assert code == 1 and report["wrong"] == 6 == len(report["findings"]) and report["records"] == 8
    assert report["errors"] == {"malformed json": 1, "empty text": 5} and report["lengths"] is None


def test_refusals_are_sentences_with_code_2(capsys, tmp_path, old):
    assert run(capsys, "check", tmp_path / "none.jsonl")[0] == 2
    code, _, err = run(capsys, "check", old, "--format", "tars")
    assert code == 2 and "format must be auto, tar, jsonl, json, parquet, folder, nano, not 'tars'" in err
    code, _, err = run(capsys, "check", old, "--decoder", "sft.qas")
    assert code == 2 and "did you mean 'sft.qa'" in err
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image_ids": list(range(64)), "answer": "a cat"}))
    flags = ("check", path, "--tokenizer", NANO_WORDS, "--decoder", "pretrain.video", "--option", "num_frames=2")
    assert run(capsys, *flags)[0] == 0
    code, _, err = run(capsys, *flags, "--option", "flat=perhaps")
    assert code == 2 and "flat: input should be a valid boolean" in err
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "convert", old, "--out", tmp_path / "file")
    assert code == 2 and err.startswith("seed: ") and len(err.splitlines()) == 1
    for wrong in (("check", "x", "--length", "0"), ("check", "x", "--max-errors", "-1"), ("convert", "x"), (),
                  ("check", "x", "--option", "flat"), ("check", "x", "--length", "abc")):
        with pytest.raises(SystemExit) as caught:
            main(["data", *wrong])
        assert caught.value.code == 2
    assert "argument --length: must be a whole number, 1 or more, not 'abc'" in capsys.readouterr().err


@pytest.mark.process
def test_a_shard_with_code_in_it_is_told_and_the_others_are_converted(tmp_path, old):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it_ran'}",)

    write_shard(old / "evil.tar", [("k", {"pkl": pickle.dumps({"image_ids": [1], "text": Evil()})})])
    done = subprocess.run([sys.executable, "-m", "seed_multimodal", "data", "convert", str(old / "*.tar"), "--out",
                           str(tmp_path / "new"), "--workers", "2"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 1, done.stderr
    assert f"seed: {old}/evil.tar: sample k.pkl: asks for posix.system" in done.stderr
    assert "2 shards converted" in done.stdout and "1 refused" in done.stdout
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "new" / "evil.tar").exists()


def test_check_of_a_registered_format(monkeypatch, capsys):
    monkeypatch.setattr("seed_nano.world.source.EPOCH", 300)
    assert main(["data", "check", str(find_world()), "--format", "nano", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 300 and report["opened"] > 100 and not report["wrong"]
    nano = ["data", "check", str(find_world()), "--format", "nano", "--json", "--format-option"]
    assert main([*nano, "content=edits", "--format-option", "number=4"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"chat (not tokenised)": 4}
    assert main([*nano, "contents=edits"]) == 2 and "(did you mean 'content'?)" in capsys.readouterr().err
    assert main(["data", "check", "x.json", "--format-option", "content=edits"]) == 2
