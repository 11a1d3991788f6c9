"""The `seed` commands with a LaVIT folder, the programs and the notebooks in `src/lavit`."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_lavit import noise

from seed_multimodal.cli import lavit as programs
from seed_multimodal.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
HOME = ROOT / "src" / "lavit"
PROGRAMS = ("understanding", "text2image_synthesis", "multimodal_synthesis", "image_detokenize", "inference")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Answers are not lemmatised")]


@pytest.fixture
def shown(tmp_path: Path) -> str:
    noise(1, (48, 30)).save(tmp_path / "shown.png")
    return str(tmp_path / "shown.png")


@pytest.fixture
def seed(tiny_lavit_folder, tmp_path, capsys):
    """Runs a `seed` command, gives its exit code and records."""
    def run(*words: str) -> tuple[int, list[dict]]:
        out = () if words[0] in ("tokenize", "describe", "ask") or "--out" in words else ("--out", f"{tmp_path}/out/")
        code = main([*words, "--model", str(tiny_lavit_folder), "--device", "cpu", "--json", *out])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


# ---- seed


def test_describe_and_ask(seed, shown, tiny_lavit):
    code, lines = seed("describe", shown, str(Path(shown).parent / "absent.png"), "--seed", "3")
    assert code == 1 and lines[0]["description"] == tiny_lavit.describe(shown, seed=3)
    code, lines = seed("ask", shown, "What is it?", "--num-beams", "2")
    assert code == 0 and lines[0]["answer"] == tiny_lavit.ask(shown, "What is it?", num_beams=2)


def test_draw_and_edit_in_sizes_and_ratios(seed, shown):
    _, lines = seed("draw", "a red apple", "--steps", "2", "--ratio", "3:2")
    assert Image.open(lines[0]["image"]).size == (80, 48)
    _, lines = seed("draw", "a red apple", "--height", "32", "--width", "40", "--guidance-scale", "2")
    assert Image.open(lines[0]["image"]).size == (40, 32)
    _, lines = seed("edit", shown, "in the snow", "--ratio", "2:3")
    assert Image.open(lines[0]["edited"]).size == (48, 80)
    assert seed("detect", shown, "the fish")[0] == 2


def test_codes_of_any_number(seed, shown, tmp_path, tiny_lavit):
    noise(2).save(tmp_path / "other.png")
    code, lines = seed("tokenize", shown, str(tmp_path / "other.png"), "--out", str(tmp_path / "codes.jsonl"))
    codes = [line["codes"] for line in lines]
    assert code == 0 and codes[0] == tiny_lavit.tokenize(shown)[0].tolist() and len(codes[0]) != len(codes[1])
    for given in ((shown,), ("--codes-file", str(tmp_path / "codes.jsonl"))):
        code, lines = seed("reconstruct", *given)
        assert code == 0 and lines[0]["codes"] == codes[0] and Image.open(lines[0]["rebuilt"]).size == (64, 64)


# ---- programs


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, tiny_lavit_folder, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_lavit_folder), "--device", "cpu"]
    own = {"understanding": ["--image", shown, "--question", "What is it?"],
           "text2image_synthesis": ["--prompt", "a red apple", "two dogs", "--num_return_images", "2", "--ratio=3:2"],
           "multimodal_synthesis": [shown, "in the snow", "--steps", "2"],
           "image_detokenize": ["--image", shown, "--steps", "2"], "inference": ["--image", shown, "--steps", "2"]}
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *own[name]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HOME / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.count("\n")
    files = {file.name for file in Path("output").glob("*")}
    wanted = {"understanding": (2, set()),
              "text2image_synthesis": (4, {"a_red_apple.png", "a_red_apple_2.png", "two_dogs.png", "two_dogs_2.png"}),
              "multimodal_synthesis": (1, {"shown_in_the_snow.png"}),
              "image_detokenize": (1, {"shown_rebuilt.png"}),
              "inference": (4, {"t2i_output.jpg", "it2i_output.jpg"})}
    assert (lines, files) == wanted[name]


def test_a_mistyped_image_is_not_drawn_as_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert programs.lavit_script("multimodal_synthesis.py", "", ["absent.png", "in the snow"]) == 2
    assert "absent.png: no such file" in capsys.readouterr().err


@pytest.mark.process
def test_evaluate_scores_captions(tiny_lavit_folder, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")  # without Java, whose scores have tests of their own
    noise(1).save(tmp_path / "1.png")
    (tmp_path / "asked.json").write_text('[{"image": "1.png", "img_id": 1}]')
    (tmp_path / "truth.json").write_text('{"images": [], "annotations": [{"image_id": 1, "caption": "a fox"}]}')
    code = programs.evaluate_script("evaluate.py", "", [
        "--task_name", "caption", "--dataset", "nocaps", "--model_path", str(tiny_lavit_folder), "--device", "cpu",
        "--imagepath", str(tmp_path), "--annopath", str(tmp_path / "asked.json"), "--truth",
        str(tmp_path / "truth.json"), "--out", str(tmp_path / "out"), "--model_dtype", "fp32"])
    assert code == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 1


# ---- notebooks


@pytest.mark.parametrize("name", PROGRAMS[:4])
def test_notebooks(name, tiny_lavit_folder, monkeypatch, tmp_path):
    """All cells of code run; none has outputs."""
    notebook = json.loads((HOME / f"{name}.ipynb").read_text())
    monkeypatch.setenv("LAVIT_MODEL", str(tiny_lavit_folder))
    monkeypatch.chdir(HOME)
    monkeypatch.syspath_prepend(str(HOME))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    code = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            code += cell["source"] + ["\n"]
    file = tmp_path / f"{name}.py"
    file.write_text(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", "".join(code)))
    made = runpy.run_path(str(file))
    monkeypatch.delitem(sys.modules, "models")
    assert any(made.get(key) for key in ("captions", "pictures", "prompts", "rebuilt"))
