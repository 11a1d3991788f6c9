"""`seed tokenize | reconstruct | describe | ask | draw | edit | convert` and the original scripts,
on a tiny system.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from PIL import Image
from real_processes import run_process
from repository import ROOT

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import load_state_dict
from seed_nano.world.things import write_known_words

IMAGES = ROOT / "images"
CAT = str(IMAGES / "cat.jpg")
FOX = str(IMAGES / "fox.png")


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> str:
    return str(tiny_folder)


@pytest.fixture
def bad(tmp_path) -> str:
    path = tmp_path / "broken.png"
    path.write_bytes(Path(FOX).read_bytes()[:300])
    return str(path)


@pytest.fixture
def seed(capsys, tiny):
    """Runs a command on the tiny system; returns exit code, lines of stdout, stderr."""

    def run(*flags: str, model: str = tiny) -> tuple[int, list[str], str]:
        code = main([*flags, *f"--model {model} --device cpu".split()])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def records(lines: list[str]) -> list[dict]:
    return [json.loads(line) for line in lines]


def pixels(path: str | Path) -> bytes:
    return Image.open(path).tobytes()


# ---- images ⇄ codes


def test_tokenize_prints_and_writes_32_codes(seed, tmp_path):
    out = tmp_path / "codes.jsonl"
    code, lines, errors = seed("tokenize", CAT, FOX, "--json", "--out", str(out))
    printed = records(lines)
    assert code == 0 and [record["image"] for record in printed] == [CAT, FOX]
    assert all(
        len(record["codes"]) == 32 and all(0 <= c < 16 for c in record["codes"])
        for record in printed
    )
    assert records(out.read_text().splitlines()) == printed
    assert "Running on cpu" in errors


def test_tokenize_skips_bad_images(seed, bad):
    command = ("tokenize", CAT, bad, "nowhere.png", FOX)
    code, single, errors = seed(*command, "--batch-size", "1")
    assert code == 1 and [line.split(":")[0] for line in single] == [CAT, FOX]
    assert "broken.png" in errors and "nowhere.png" in errors and "2 of 4 done, 2 failed" in errors
    assert seed(*command)[:2] == (1, single)


def test_reconstruct_of_images_equals_that_of_their_codes(seed, tmp_path):
    codes = str(tmp_path / "codes.jsonl")
    seed("tokenize", CAT, FOX, "--out", codes)
    code, lines, _ = seed("reconstruct", CAT, FOX, "--out", str(tmp_path / "a"), "--json")
    paths = [Path(record["rebuilt"]) for record in records(lines)]
    assert code == 0 and [path.name for path in paths] == ["cat_rebuilt.png", "fox_rebuilt.png"]
    assert seed("reconstruct", "--codes-file", codes, "--out", str(tmp_path / "b"))[0] == 0
    assert all(pixels(path) == pixels(tmp_path / "b" / path.name) for path in paths)


def test_reconstruct_from_the_first_codes(seed, tmp_path):
    flags = ("--steps", "2", "--json", "--out")
    code, lines, _ = seed("reconstruct", CAT, FOX, "--codes", "4,8,32", *flags, str(tmp_path / "a"))
    printed = records(lines)
    assert code == 0 and [list(record["rebuilt"]) for record in printed] == 2 * [["4", "8", "32"]]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        f"{stem}_rebuilt_{end}.png" for stem in ("cat", "fox") for end in (4, 8, 32, "codes")
    )
    seed("reconstruct", FOX, *flags, str(tmp_path / "whole.png"))
    seed("reconstruct", FOX, "--codes", "8, 8", *flags, str(tmp_path / "eight.png"))
    rebuilt = printed[1]["rebuilt"]
    assert pixels(rebuilt["32"]) == pixels(tmp_path / "whole.png") != pixels(rebuilt["4"])
    assert pixels(rebuilt["8"]) == pixels(tmp_path / "eight.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--codes", "33"), "at most 32"),
        (("--codes", "8,16", "--out", "one.png"), "one file for 2 images"),
        (("--codes-file", "nowhere.jsonl"), "give either images or --codes-file"),
        (("--steps", "0"), "num_inference_steps"),
    ],
)
def test_reconstruct_with_wrong_values(seed, flags, message):
    code, lines, errors = seed("reconstruct", FOX, *flags)
    assert (code, lines) == (2, []) and message in errors


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("not json", 2),
        ('{"image": "a"}', 2),
        (json.dumps([1] * 32) + "\n" + json.dumps([1] * 31) + "\n" + json.dumps([99] * 32), 1),
    ],
)
def test_reconstruct_with_wrong_codes(seed, tmp_path, content, code):
    (tmp_path / "codes.jsonl").write_text(content)
    actual, lines, errors = seed(
        "reconstruct", "--codes-file", str(tmp_path / "codes.jsonl"), "--out", str(tmp_path)
    )
    assert (actual, len(lines)) == (code, 2 - code)
    assert "codes.jsonl" in errors if code == 2 else "codes_2" in errors and "codes_3" in errors


# ---- with the language model


def test_describe_and_ask_in_batches(seed, bad):
    code, lines, errors = seed("describe", CAT, bad, FOX, "--json")
    together = records(lines)
    assert code == 1 and "broken.png" in errors and set(together[0]) == {"image", "description"}
    assert records(seed("describe", CAT, FOX, "--json", "--batch-size", "1")[1]) == together
    code, lines, _ = seed("ask", CAT, FOX, "What is this?", "--json", "--max-new-tokens", "4")
    assert code == 0 and [record["question"] for record in records(lines)] == ["What is this?"] * 2


def test_draw_names_files_after_texts_and_depends_on_the_seed(seed, tmp_path):
    out = str(tmp_path / "deep" / "er")
    code, lines, _ = seed(
        "draw", "a/b: ../c", "a/b: ../c", *f"--seed 1 --steps 2 --out {out} --json".split()
    )
    first, second = (record["image"] for record in records(lines))
    assert code == 0 and [Path(first).name, Path(second).name] == [
        "a_b__.._c.png",
        "a_b__.._c_2.png",
    ]
    assert pixels(first) == pixels(second)
    seed("draw", "a/b: ../c", *f"--seed 2 --steps 2 --out {tmp_path / 'other.png'}".split())
    assert pixels(first) != pixels(tmp_path / "other.png")


def test_draw_from_the_first_codes(seed, tmp_path):
    code, lines, _ = seed(
        "draw", "a red apple", *f"--steps 2 --json --codes 8,32 --out {tmp_path}".split()
    )
    record = records(lines)[0]
    seed("draw", "a red apple", "--steps", "2", "--out", str(tmp_path))
    assert code == 0 and pixels(record["image"]["8"]) != pixels(record["image"]["32"])
    assert pixels(record["image"]["32"]) == pixels(tmp_path / "a_red_apple.png")
    assert Path(record["sheet"]).name == "a_red_apple_codes.png"


def test_draw_and_edit_save_several_images(seed, tmp_path):
    flags = f"--seed 1 --steps 2 --json --out {tmp_path}".split()
    code, lines, _ = seed("draw", "a red apple", "a fish", "-n", "3", *flags)
    apples, fishes = (record["image"] for record in records(lines))
    assert code == 0 and [Path(path).name for path in apples] == [
        "a_red_apple.png",
        "a_red_apple_2.png",
        "a_red_apple_3.png",
    ]
    assert len({str(pixels(path)) for path in apples}) == 3 and len(fishes) == 3
    code, lines, _ = seed("edit", CAT, "Make it green.", "--num-images", "2", *flags)
    assert code == 0 and len(records(lines)[0]["edited"]) == 2
    assert seed("draw", "a red apple", "-n", "2", "--codes", "8", *flags)[0] == 2


def test_draw_notes_unknown_words(seed, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "nano")
    settings = json.loads((folder / "system.json").read_text())
    (folder / "system.json").write_text(json.dumps({**settings, "known_words": "known.json"}))
    write_known_words(folder / "known.json")
    code, lines, errors = seed(
        "draw", "a zebra", "--steps", "1", "--json", "--out", str(tmp_path), model=str(folder)
    )
    assert (
        code == 0
        and len(lines) == 1
        and errors.count("This system does not know 'zebra': it learned ") == 1
    )


def test_edit_saves_images(seed, tmp_path):
    code, lines, _ = seed("edit", CAT, FOX, "Make it green.", "--out", str(tmp_path), "--json")
    names = [Path(record["edited"]).name for record in records(lines)]
    assert code == 0 and names == ["cat_edited.png", "fox_edited.png"]
    assert Image.open(records(lines)[0]["edited"]).size == (16, 16)
    for flags in (("--max-new-tokens", "20"), ("--out", f"{CAT}/x"), ("--temperature", "-1")):
        code, lines, errors = seed("edit", CAT, "Make it green.", *flags)
        assert (code, lines) == (2, []) and errors.splitlines()[-1].startswith("seed: ")


# ---- the whole command


def test_unknown_model_or_flag(seed, capsys):
    code, lines, errors = seed("describe", CAT, model="/no/such/model")
    assert (
        (code, lines) == (2, [])
        and errors.startswith("seed: /no/such/model")
        and errors.count("\n") == 1
    )
    with pytest.raises(CheckpointError):
        main(f"describe {CAT} --model /no/such/model --debug".split())
    with pytest.raises(SystemExit):
        main(["draw", "a cat", "--modle", "nano"])
    assert "--modle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--url", "--url is for --engine openai, not for torch."),
        ("--gguf", "--gguf is for --engine llama.cpp, not for torch."),
    ],
)
def test_flag_of_another_engine(seed, flag, sentence):
    code, lines, errors = seed("describe", FOX, flag, "value")
    assert (code, lines) == (2, [])
    assert errors.endswith(f"{sentence}\n")


def test_tokenize_with_damaged_weights(seed, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    weights = folder / "seed_tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    code, _, errors = seed("tokenize", CAT, model=str(folder))
    assert code == 2 and "model.safetensors" in errors and "Traceback" not in errors


@pytest.mark.process
def test_help_does_not_import_torch():
    run = run_process(
        [sys.executable, "-X", "importtime", "-m", "seed_multimodal", "--help"],
        cwd=ROOT / "src",
        timeout=60,
    )
    assert run.returncode == 0 and "reconstruct" in run.stdout
    assert "| torch\n" not in run.stderr and "| transformers\n" not in run.stderr


# ---- convert


def test_convert_writes_safetensors_once(capsys, tmp_path):
    old = tmp_path / "old.pt"
    torch.save({"model": {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.int64)}}, old)
    assert main(["convert", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 6
    loaded = load_state_dict(tmp_path / "old.safetensors")
    assert torch.equal(loaded["a"], torch.arange(4.0)) and torch.equal(
        loaded["b"], torch.ones(2, dtype=torch.int64)
    )
    assert main(["convert", str(old)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["convert", str(old), "--force"]) == 0


def test_convert_of_unsafe_and_damaged_files(capsys, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "trap.bin").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:700])
    for name in ("trap.bin", "trap.pt", "half.pt"):
        assert main(["convert", str(tmp_path / name)]) == 2 and name in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "trap.safetensors").exists()


# ---- scripts with the original names


def script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_process(
        [warm_python.PYTHON, str(ROOT / "scripts" / name), "--device", "cpu", *arguments],
        cwd=cwd,
        timeout=170,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("seed_tokenizer_inference.py", "seed_tokenizer"),
        ("seed_llama_inference_8B.py", "seed_llama_8b_sft"),
        ("seed_llama_inference_14B.py", "seed_llama_14b_sft"),
    ],
)
def test_scripts_without_weights(name, folder):
    if (ROOT / "pretrained" / folder).exists():
        pytest.skip("the original weights are on this disk")
    run = script(name)
    assert run.returncode == 2 and run.stdout == ""
    assert (
        f"pretrained/{folder}" in run.stderr
        and "--model nano" in run.stderr
        and run.stderr.count("\n") == 1
    )


@pytest.mark.process
def test_tokenizer_script(tiny, tmp_path):
    run = script(
        "seed_tokenizer_inference.py",
        *f"--model {tiny} --image {FOX} --prompt What?".split(),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()[0].split()) == 32 and Image.open(
        tmp_path / "cat.jpg"
    ).size == (16, 16)


@pytest.mark.process
def test_llama_scripts(tiny, tmp_path):
    run = script(
        "seed_llama_inference_8B.py", "--model", tiny, "--out", str(tmp_path / "results.v2")
    )
    assert run.returncode == 0, run.stderr
    assert {p.name for p in (tmp_path / "results.v2").iterdir()} == {
        "dog.jpg",
        "cat_sunglasses.jpg",
    }
    run = script(
        "seed_llama_inference_14B.py",
        *f"--model {tiny} --image {CAT} --prompt What?".split(),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
