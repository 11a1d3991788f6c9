"""Whatever is typed after `seed`, the command does it, or refuses in one sentence: flags x values."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm_python

from seed_multimodal.cli import build_parser, main
from seed_multimodal.entry import guarded

CAT = str(Path(__file__).resolve().parents[2] / "images" / "cat.jpg")
NUMBERS = ["", "nan", "inf", "-1", "0", "1.5", "2.0", "1e-38", "1e-45", "1e308", "9" * 23, "9" * 5000,
           "x", "\uff11", "\udcff", "2000"]
TEXTS = ["", "  ", "...", "a\udcffb", "\ud800", "\x00", "a\nb", "\U0001f41f", "x" * 5000, "-"]


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str]:
    """Exit code of a command, and the last line it says on stderr; a traceback fails the test."""
    try:
        code = main(argv)
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    shown = capsys.readouterr()
    last = shown.err.rstrip("\n").rpartition("\n")[2]
    assert code == 0 or (code in (1, 2) and last and "Traceback" not in shown.err), (argv, code, shown.err)
    return code, last


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--temperature", "--top-p", "--max-new-tokens", "--num-beams", "--seed", "--steps",
                                  "--guidance-scale", "--batch-size"])
def test_numbers(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str) -> None:
    usual = ["--model", str(tiny_folder), "--device", "cpu"]
    if flag in ("--steps", "--guidance-scale", "--batch-size"):
        command = ["reconstruct", CAT, "--out", f"{tmp_path}/", "--steps", "1", *usual]
    else:
        command = ["ask", CAT, "What?", "--max-new-tokens", "2", *usual]
    done = {value: run(capsys, *command, f"{flag}={value}") for value in NUMBERS
            if flag != "--num-beams" or value not in ("2000", "9" * 23)}
    assert sum(code > 0 for code, _ in done.values()) >= 5
    name = "steps" if flag == "--steps" else flag.strip("-").replace("-", "_")
    if flag not in ("--batch-size", "--seed"):
        assert name in done["nan"][1].replace("-", "_"), done["nan"]
    if flag == "--steps":
        assert done["2000"][1] == "seed: num_inference_steps must be at most 1000, not 2000."


@pytest.mark.slow
def test_texts_and_names(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # some of these texts are names of files, too
    usual = ["--model", str(tiny_folder), "--device", "cpu"]
    drawn = ["--out", f"{tmp_path}/", "--steps", "1", *usual]
    for text in TEXTS:
        code, said = run(capsys, "draw", text, *drawn)
        assert code == int(text in ("", "  ", "...", "a\udcffb", "\ud800", "x" * 5000)), (text, said)
        run(capsys, "ask", CAT, text, *usual)
        run(capsys, "chat", "--message", text, "--out", f"{tmp_path}/", *usual)
        run(capsys, "tokenize", CAT, "--out", text or ".", *usual)
        for command in (["describe", text], ["reconstruct", "--codes", text], ["chat", "--message=x", "--image", text]):
            code, _ = run(capsys, *command, *usual)
            assert code or Path(text).is_file(), (command, text)
        for flag in ("--device", "--dtype"):
            assert run(capsys, "ask", CAT, "q", "--model", str(tiny_folder), flag, text)[0] == 2
        assert run(capsys, "ask", CAT, "q", "--model", text)[0] == 2
    assert run(capsys, "draw", "", "a fish", *drawn) == (1, "seed: 1 of 2 done, 1 refused: ''.")


@pytest.mark.parametrize(("typed", "pictures", "text"), [
    ("edit a b --model x T", ["a", "b"], "T"), ("edit a --steps 3 b --model x T --json", ["a", "b"], "T"),
    ("edit --model x a T", ["a"], "T"), ("edit a T --model x", ["a"], "T"), ("edit a --model x -- -T", ["a"], "-T"),
    ("ask a --json b c --model x Q", ["a", "b", "c"], "Q"), ("detect a b --out o P", ["a", "b"], "P"),
])
def test_options_between_pictures_and_text(typed: str, pictures: list[str], text: str) -> None:
    args = build_parser().parse_args(typed.split())
    assert args.pictures == pictures and text in (getattr(args, "instruction", None), getattr(args, "question", None),
                                                  getattr(args, "phrase", None))


@pytest.mark.parametrize(("typed", "sentence"), [
    ("edit a b --stpes 3 T", "unrecognized arguments: --stpes 3 T (did you mean '--steps'?)"),
    ("chat --image a b", "unrecognized arguments: b"), ("edit a --model x", "arguments are required: INSTRUCTION"),
    ("convert a b --force c", "unrecognized arguments: c"),
])
def test_words_that_have_no_place(capsys: pytest.CaptureFixture, typed: str, sentence: str) -> None:
    code, last = run(capsys, *typed.split())
    assert code == 2 and sentence in last


def test_memory_that_does_not_suffice(capsys: pytest.CaptureFixture) -> None:
    """What torch's allocators raise, and Python's own."""
    import torch

    for work in (lambda: torch.empty(2**58), lambda: bytearray(2**62)):
        assert guarded("seed", False, work) == 2  # type: ignore[arg-type]
        said = capsys.readouterr().err
        assert said.startswith("seed: memory does not suffice (") and said.count("\n") == 1 and "--offload" in said
        with pytest.raises((RuntimeError, MemoryError)):
            guarded("seed", True, work)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ['{"codes":' + "[" * 100_000, "[" + "9" * 5000 + "]", '{"codes": [1.5]}', "\x00",
                                  '{"codes": [1e999]}', '{"codes": [{"a": 1}]}', '{"picture": {}, "codes": [[]]}',
                                  "[" + "1," * 31 + "NaN]"],
                         ids=lambda line: line[:16])
def test_files_of_codes(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: str) -> None:
    (tmp_path / "codes.jsonl").write_text(line + "\n")
    assert run(capsys, "reconstruct", "--codes", str(tmp_path / "codes.jsonl"), "--out", f"{tmp_path}/", "--model",
               str(tiny_folder), "--device", "cpu")[0] > 0


@pytest.mark.process
@pytest.mark.slow
def test_bytes_that_are_no_text(tiny_folder: Path, tmp_path: Path) -> None:
    """On stdin, on the command line, and in the names of files, which are read and told all the same."""
    usual = ["--model", str(tiny_folder), "--device", "cpu"]
    program = [warm_python.PYTHON, "-m", "seed_multimodal"]
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(odd, "wb") as file:
        file.write(Path(CAT).read_bytes())
    lines = b"\xff\xfe\n\xed\xa0\x80\n/image " + odd + b"\nhello\n"
    talk = subprocess.run([*program, "chat", "--max-new-tokens", "2", "--out", str(tmp_path / "out"), "--json", *usual],
                          input=lines, capture_output=True, timeout=120, cwd=tmp_path)
    assert talk.returncode == 0 and b"Traceback" not in talk.stderr
    assert talk.stderr.count(b"which is not UTF-8") == 2 and b"goes with your next message" in talk.stderr
    assert json.loads(talk.stdout)["message"] == "hello"
    codes = subprocess.run([*program, "tokenize", odd, "--json", "--out", str(tmp_path / "codes.jsonl"), *usual],
                           capture_output=True, timeout=120)
    record = json.loads(codes.stdout)
    assert codes.returncode == 0 and os.fsencode(record["picture"]) == odd
    assert json.loads((tmp_path / "codes.jsonl").read_text()) == record
