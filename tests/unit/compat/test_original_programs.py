"""Users' own programs with the originals' objects: hydra, pyrootutils and YAML files, on nano's and
nano-x's parts.
"""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderTiny
from omegaconf import OmegaConf
from PIL import Image
from repository import NANO, ROOT
from tiny import read_json

NANO_X = ROOT / "pretrained" / "nano-x"
pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A working directory with copies of the repository's YAML files."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "images").symlink_to(ROOT / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(file, **values):
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), values), file)


@pytest.fixture
def run(checkout, monkeypatch, capsys):
    """Runs a program in the checkout; returns the lines that it prints."""

    def run(program: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [program, "cpu"])
        # pyrootutils adds the repository to the path, where `src` and `models` are found.
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("PROJECT_ROOT", "")
        runpy.run_path(str(ROOT / "tests/support/original_programs" / program), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] in ("src", "models")]:
        del sys.modules[name]


def difference(checkout: Path, image: str, source: str) -> float:
    """Mean distance of two images' pixels, 0 … 255."""
    size = Image.open(checkout / image).size
    first, second = (
        np.asarray(Image.open(file).convert("RGB").resize(size), dtype=np.float32)
        for file in (checkout / image, ROOT / "images" / source)
    )
    return float(np.abs(first - second).mean())


def test_seed_llama_by_hydra(checkout, run):
    change(
        checkout / "configs/tokenizer/seed_llama_tokenizer_hf.yaml",
        diffusion_path=None,
        pretrained_model_name_or_path=str(NANO / "seed_tokenizer"),
    )
    change(checkout / "configs/transform/clip_transform.yaml", image_size=64)
    change(
        checkout / "configs/llm/seed_llama_8b.yaml",
        pretrained_model_name_or_path=str(NANO / "seed_llama"),
    )
    codes, text = run("seed_llama.py")[-2:]
    assert len(codes.split()) == 32 and "fox" in text
    assert difference(checkout, "rebuilt.png", "fox.png") < 40 and Image.open(
        checkout / "drawn.png"
    ).size == (64, 64)


def test_seed_x_by_hydra(checkout, run, monkeypatch):
    # The program reads SDXL's autoencoder; nano's has another class.
    monkeypatch.setattr("diffusers.AutoencoderKL", AutoencoderTiny)
    sizes = read_json(NANO_X / "agent" / "config.json")
    resamplers = {name: sizes[name] for name in ("input_resampler", "output_resampler")}
    configs = checkout / "configs"
    change(
        configs / "tokenizer/clm_llama_tokenizer_224loc_anyres.yaml",
        pretrained_model_name_or_path=str(NANO_X / "tokenizer"),
    )
    change(configs / "processer/qwen_448_transform.yaml", image_size=64)
    change(
        configs / "visual_encoder/qwen_vitg_448.yaml", pretrained_model_path=str(NANO_X / "vision")
    )
    change(
        configs / "clm_models/llm_seed_x_i.yaml", pretrained_model_name_or_path=str(NANO_X / "llm")
    )
    change(
        configs / "clm_models/agent_seed_x_i.yaml",
        pretrained_model_path=str(NANO_X / "agent"),
        **resamplers,
    )
    for file in (configs / "sdxl_adapter").glob("*.yaml"):
        change(
            file,
            pretrained_model_path=str(NANO_X / "detokenizer"),
            resampler=read_json(NANO_X / "detokenizer" / "resampler.json"),
        )
    write_sdxl(checkout / "pretrained" / "stable-diffusion-xl-base-1.0")

    printed = dict(line.split(": ", 1) for line in run("seed_x.py") if ": " in line)
    assert "fox" in printed["describe"] and "snowman" in printed["describe"]
    assert "<box_start>" in printed["find"]
    assert printed["forced"] == printed["asked"] == printed["edit"] == "True 1"
    for name in ("rebuilt", "rebuilt_with_condition", "forced", "asked", "edited"):
        assert Image.open(checkout / f"{name}.png").size == (64, 64)
    assert difference(checkout, "rebuilt_with_condition.png", "fox_and_snowman.png") < 40


def write_sdxl(folder):
    """SDXL's diffusers folder at nano-x's sizes: its U-Net with new weights, which the adapter's
    replace.
    """
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(NANO_X / "sdxl" / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 4}).save_pretrained(folder / "unet")
    shutil.copytree(NANO / "seed_tokenizer" / "diffusion_model" / "vae", folder / "vae")
    shutil.copytree(NANO_X / "sdxl" / "scheduler", folder / "scheduler")
