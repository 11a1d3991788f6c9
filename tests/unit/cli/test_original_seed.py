"""The three programs of SEED read the original's YAML files, here with nano's parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from repository import NANO, ROOT

from seed_multimodal.compat.seed_llama_programs import llama_script, tokenizer_script

pytestmark = pytest.mark.slow
TOKENIZER = "configs/tokenizer/seed_llama_tokenizer_hf.yaml"
TRANSFORM = "configs/transform/clip_transform.yaml"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The working directory: the repository's `configs/` with edited paths and sizes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".project-root").touch()
    (tmp_path / "images").symlink_to(ROOT / "images")
    edit(tmp_path / TOKENIZER, "AILab-CVC/seed-tokenizer-2", f"{NANO}/seed_tokenizer")
    edit(
        tmp_path / TOKENIZER,
        "stabilityai/stable-diffusion-2-1-unclip",
        f"{NANO}/seed_tokenizer/diffusion_model",
    )
    edit(tmp_path / TRANSFORM, "image_size: 224", "image_size: 64")
    for size in ("8b", "14b"):
        edit(
            tmp_path / f"configs/llm/seed_llama_{size}.yaml",
            f"${{oc.env:PROJECT_ROOT}}/pretrained/seed_llama_{size}_sft",
            f"{NANO}/seed_llama",
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def codes_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What the tokenizer's program prints about a wide image."""
    wide = Image.new("RGB", (96, 32), "blue")
    wide.paste(Image.effect_noise((32, 32), 90), (32, 0))
    wide.save("wide.png")
    capsys.readouterr()
    assert tokenizer_script(["--device", "cpu", "--image", "wide.png"]) == 0
    return capsys.readouterr().out.splitlines()[0]


def test_tokenizer_script_with_an_edited_transform(checkout, capsys):
    plain = codes_of(capsys)
    assert len(plain.split()) == 32 and Image.open("cat.jpg").size == (64, 64)
    edit(checkout / TRANSFORM, "keep_ratio: False", "keep_ratio: True")
    assert codes_of(capsys) != plain
    edit(checkout / TRANSFORM, "image_size: 64", "image_size: 32")
    assert tokenizer_script(["--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"{TRANSFORM}: image_size is 32, but the tokenizer reads images of 64 pixels" in error


def test_tokenizer_script_with_an_edited_diffusion_path(checkout, capsys):
    assert tokenizer_script(["--device", "cpu"]) == 0
    before = np.asarray(Image.open("cat.jpg"))
    edit(
        checkout / TOKENIZER,
        f"{NANO}/seed_tokenizer/diffusion_model",
        "stabilityai/stable-diffusion-2-1-unclip",
    )
    assert (
        tokenizer_script(["--device", "cpu"]) == 0
    )  # stands for the tokenizer's own diffusion_model
    assert np.array_equal(before, np.asarray(Image.open("cat.jpg")))
    shutil.copytree(NANO / "seed_tokenizer" / "diffusion_model", checkout / "mirror")
    (checkout / "mirror" / "seed_decode.json").write_text('{"num_inference_steps": 1}')
    edit(checkout / TOKENIZER, "stabilityai/stable-diffusion-2-1-unclip", "mirror")
    assert tokenizer_script(["--device", "cpu"]) == 0
    assert not np.array_equal(before, np.asarray(Image.open("cat.jpg")))
    edit(checkout / TOKENIZER, "diffusion_path: mirror", "diffusion_path: nowhere/at-all")
    capsys.readouterr()
    assert tokenizer_script(["--device", "cpu"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["8b", "14b"])
def test_llama_scripts_with_edited_files(checkout, size, capsys):
    assert (
        llama_script(size, [*"--device cpu --image images/fox.png --prompt".split(), "What is it?"])
        == 0
    )
    assert capsys.readouterr().out.strip()
    edit(checkout / f"configs/llm/seed_llama_{size}.yaml", "seed_llama\n", "no_such_llm\n")
    assert llama_script(size, ["--device", "cpu"]) == 2
    assert "no_such_llm" in capsys.readouterr().err


def test_scripts_with_files_and_another_model(checkout, capsys):
    flags = ["--model", str(NANO), "--tokenizer", TOKENIZER]
    assert tokenizer_script(flags) == 2 and llama_script("8b", flags) == 2
    assert capsys.readouterr().err.count("--tokenizer names a part of the original model") == 2
    assert llama_script("8b", ["--engine", "openai"]) == 2
    assert "--engine openai needs --model 8b" in capsys.readouterr().err


def test_scripts_with_a_flag_of_another_engine(checkout, capsys):
    assert llama_script("8b", ["--url", "http://127.0.0.1:1"]) == 2
    assert "--url is for --engine openai, not for torch." in capsys.readouterr().err
    assert llama_script("8b", ["--model", str(NANO), "--gguf", "x.gguf"]) == 2
    assert "--gguf is for --engine llama.cpp, not for torch." in capsys.readouterr().err
