"""The three programs of SEED read the original's YAML files, here with nano's parts."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from random_images import noise
from repository import NANO, ROOT

from seed_multimodal.compat.programs import run_original

pytestmark = pytest.mark.slow
TOKENIZER = "configs/tokenizer/seed_llama_tokenizer_hf.yaml"
TRANSFORM = "configs/transform/clip_transform.yaml"
DIFFUSION = "stabilityai/stable-diffusion-2-1-unclip"
ON_CPU = ["--device", "cpu"]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The working directory: the repository's `configs/` with edited paths and sizes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".project-root").touch()
    monkeypatch.chdir(tmp_path)
    edit(TOKENIZER, "AILab-CVC/seed-tokenizer-2", f"{NANO}/seed_tokenizer")
    edit(TRANSFORM, "image_size: 224", "image_size: 64")
    path = "${oc.env:PROJECT_ROOT}/pretrained/seed_llama_8b_sft"
    edit("configs/llm/seed_llama_8b.yaml", path, f"{NANO}/seed_llama")
    return tmp_path


def edit(file: str, before: str, after: str):
    text = Path(file).read_text()
    assert before in text
    Path(file).write_text(text.replace(before, after))


def test_tokenizer_script_with_an_edited_transform(checkout, capsys):
    # Users of the originals edit these files; a change must not be ignored.
    noise(0, (96, 32)).save("wide.png")
    codes = []
    for keep_ratio in ("False", "True"):
        edit(TRANSFORM, "keep_ratio: False", f"keep_ratio: {keep_ratio}")
        assert (
            run_original("seed_tokenizer_inference.py", "", [*ON_CPU, "--image", "wide.png"]) == 0
        )
        codes.append(capsys.readouterr().out.splitlines()[0].split())
    assert len(codes[0]) == 32 and codes[0] != codes[1]
    # The tokenizer reads images of one size.
    edit(TRANSFORM, "image_size: 64", "image_size: 32")
    assert run_original("seed_tokenizer_inference.py", "", ON_CPU) == 2
    assert "image_size is 32" in capsys.readouterr().err


def test_tokenizer_script_with_an_edited_diffusion_path(checkout, capsys):
    shutil.copytree(f"{NANO}/seed_tokenizer/diffusion_model", "mirror")
    Path("mirror/seed_decode.json").write_text('{"num_inference_steps": 1}')
    # The original's hub id stands for the tokenizer's own folder; another has its own settings.
    drawings = []
    for path in (DIFFUSION, "mirror"):
        edit(TOKENIZER, f"diffusion_path: {DIFFUSION}", f"diffusion_path: {path}")
        assert run_original("seed_tokenizer_inference.py", "", ON_CPU) == 0
        drawings.append(Image.open("cat.jpg").tobytes())
    assert drawings[0] != drawings[1]
    edit(TOKENIZER, "diffusion_path: mirror", "diffusion_path: nowhere/at-all")
    assert run_original("seed_tokenizer_inference.py", "", ON_CPU) == 2
    assert "nowhere/at-all" in capsys.readouterr().err


def test_llama_script_with_edited_files(checkout, capsys):
    question = ["--image", str(ROOT / "images" / "fox.png"), "--prompt", "What is it?"]
    assert run_original("seed_llama_inference_8B.py", "", [*ON_CPU, *question]) == 0
    assert capsys.readouterr().out.strip()
    edit("configs/llm/seed_llama_8b.yaml", "seed_llama\n", "no_such_llm\n")
    assert run_original("seed_llama_inference_8B.py", "", ON_CPU) == 2
    assert "no_such_llm" in capsys.readouterr().err
