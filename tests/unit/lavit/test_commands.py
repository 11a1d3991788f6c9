"""`seed` commands with a LaVIT folder, programs and notebooks in `src/lavit`."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from random_images import noise
from repository import ROOT

from seed_multimodal.cli.main import main
from seed_multimodal.compat import lavit_programs as programs

HOME = ROOT / "src" / "lavit"
PROGRAMS = (
    "understanding",
    "text2image_synthesis",
    "multimodal_synthesis",
    "image_detokenize",
    "inference",
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Answers are not lemmatised")]


@pytest.fixture
def image(tmp_path) -> str:
    noise(1, (48, 30)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def seed(tiny_lavit_folder, tmp_path, capsys):
    """Runs a `seed` command and returns its exit code and records."""

    def run(*argv: str) -> tuple[int, list[dict]]:
        out = (
            ()
            if argv[0] in ("tokenize", "describe", "ask") or "--out" in argv
            else ("--out", f"{tmp_path}/out/")
        )
        code = main([*argv, *f"--model {tiny_lavit_folder} --device cpu --json".split(), *out])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


# ---- seed


def test_describe_and_ask(seed, image, tiny_lavit):
    code, lines = seed("describe", image, str(Path(image).parent / "absent.png"), "--seed", "3")
    assert code == 1 and lines[0]["description"] == tiny_lavit.describe(image, seed=3)
    code, lines = seed("ask", image, "What is it?", "--num-beams", "2")
    assert code == 0 and lines[0]["answer"] == tiny_lavit.ask(image, "What is it?", num_beams=2)


def test_tokenize_and_reconstruct_select_patches_by_seed(seed, image, tiny_lavit):
    codes = {}
    for value in (1, 2):
        _, (tokenized,) = seed("tokenize", image, "--seed", str(value))
        _, (rebuilt,) = seed("reconstruct", image, "--seed", str(value), "--steps", "1")
        codes[value] = tokenized["codes"]
        assert (
            codes[value] == rebuilt["codes"] == tiny_lavit.tokenize(image, seed=value)[0].tolist()
        )
        expected = tiny_lavit.reconstruct(image, seed=value, num_inference_steps=1)[0]
        assert Image.open(rebuilt["rebuilt"]).tobytes() == expected.tobytes()
    assert codes[1] != codes[2]


def test_draw_and_edit_with_sizes_and_ratios(seed, image):
    _, lines = seed("draw", "a red apple", "--steps", "2", "--ratio", "3:2")
    assert Image.open(lines[0]["image"]).size == (80, 56)
    _, lines = seed(
        "draw",
        "a red apple",
        *"--steps 1 --height 32 --width 40 --guidance-scale 2".split(),
    )
    assert Image.open(lines[0]["image"]).size == (40, 32)
    _, lines = seed("edit", image, "in the snow", "--steps", "1", "--ratio", "2:3")
    assert Image.open(lines[0]["edited"]).size == (56, 80)
    assert seed("detect", image, "the fish")[0] == 2


def test_tokenize_and_reconstruct(seed, image, tmp_path, tiny_lavit):
    """Images have different numbers of codes."""
    noise(2).save(tmp_path / "other.png")
    code, lines = seed(
        "tokenize", image, str(tmp_path / "other.png"), "--out", str(tmp_path / "codes.jsonl")
    )
    codes = [line["codes"] for line in lines]
    assert (
        code == 0
        and codes[0] == tiny_lavit.tokenize(image)[0].tolist()
        and len(codes[0]) != len(codes[1])
    )
    for source in ((image,), ("--codes-file", str(tmp_path / "codes.jsonl"))):
        code, lines = seed("reconstruct", *source, "--steps", "2")
        assert (
            code == 0
            and lines[0]["codes"] == codes[0]
            and Image.open(lines[0]["rebuilt"]).size == (64, 64)
        )


# ---- programs


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, tiny_lavit_folder, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps = ["--steps", "1"]
    flags, lines, files = {
        "understanding": (["--image", image, "--question", "What is it?"], 2, set()),
        "text2image_synthesis": (
            [
                "--prompt",
                "a red apple",
                "two dogs",
                "--num_return_images",
                "2",
                "--ratio=3:2",
                *steps,
            ],
            4,
            {"a_red_apple.png", "a_red_apple_2.png", "two_dogs.png", "two_dogs_2.png"},
        ),
        "multimodal_synthesis": ([image, "in the snow", *steps], 1, {"image_in_the_snow.png"}),
        "image_detokenize": (["--image", image, *steps], 1, {"image_rebuilt.png"}),
        "inference": (["--image", image, *steps], 4, {"t2i_output.jpg", "it2i_output.jpg"}),
    }[name]
    monkeypatch.setattr(
        sys, "argv", [*f"{name}.py --model {tiny_lavit_folder} --device cpu".split(), *flags]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HOME / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.count("\n") == lines
    assert {file.name for file in Path("output").glob("*")} == files


def test_multimodal_synthesis_with_a_missing_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert programs.lavit_script("multimodal_synthesis.py", "", ["absent.png", "in the snow"]) == 2
    assert "absent.png: no such file" in capsys.readouterr().err


@pytest.mark.process
def test_evaluate_captions(tiny_lavit_folder, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")  # without Java (its scores: tests/unit/evaluation)
    noise(1).save(tmp_path / "1.png")
    (tmp_path / "images.json").write_text('[{"image": "1.png", "img_id": 1}]')
    (tmp_path / "truth.json").write_text(
        '{"images": [], "annotations": [{"image_id": 1, "caption": "a fox"}]}'
    )
    code = programs.evaluate_script(
        "evaluate.py",
        "",
        (
            f"--task_name caption --dataset nocaps --model_path {tiny_lavit_folder} "
            f"--device cpu --imagepath {tmp_path} --annopath {tmp_path / 'images.json'} "
            f"--truth {tmp_path / 'truth.json'} --out {tmp_path / 'out'} --model_dtype fp32"
        ).split(),
    )
    assert code == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 1


@pytest.mark.parametrize(
    ("task", "dataset", "file"),
    [
        ("caption", "coco", "data/coco/annotations/coco_karpathy_test.json"),
        ("vqa", "gqa", "data/gqa/annotations/testdev_balanced_questions.json"),
        ("text2image", "coco", "data/coco/annotations/coco_t2i_eval.json"),
    ],
)
def test_evaluate_looks_in_the_folders_of_the_original(
    task, dataset, file, tiny_lavit_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = (
        f"--task_name {task} --dataset {dataset} --model_path {tiny_lavit_folder} --device cpu"
    ).split()
    assert programs.evaluate_script("evaluate.py", "", flags) == 2
    assert f"--annopath {file}: no such file" in capsys.readouterr().err
    Path(file).parent.mkdir(parents=True)
    Path(file).write_text("[]")
    assert programs.evaluate_script("evaluate.py", "", flags) == 2
    assert f"--imagepath data/{dataset}/images: no such folder" in capsys.readouterr().err
    Path(f"data/{dataset}/images").mkdir()
    if task == "text2image":
        assert programs.evaluate_script("evaluate.py", "", flags) == 2
        stderr = capsys.readouterr().err
        assert "openai_clip_ViT-L-14.bin into --model_path" in stderr and "--best-of" not in stderr


def test_evaluate_without_weights_names_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(
        '[{"image": "a.png", "question": "what?", "question_id": 1, "answer": "a"}]'
    )
    assert (
        programs.evaluate_script("evaluate.py", "", ["--annopath", "a.json", "--imagepath", "."])
        == 2
    )
    stderr = capsys.readouterr().err
    assert (
        "LaVIT-7B-v2" in stderr and "evaluate.py: --model_path" in stderr and "nano-lavit" in stderr
    )


# ---- notebooks


@pytest.mark.parametrize("name", PROGRAMS[:4])
def test_notebooks(name, tiny_lavit_folder, monkeypatch, tmp_path):
    """All code cells run; none has outputs."""
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
    file.write_text(re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", "".join(code)))
    variables = runpy.run_path(str(file))
    monkeypatch.delitem(sys.modules, "models")
    assert any(variables.get(key) for key in ("captions", "pictures", "prompts", "rebuilt"))
