"""Stable Diffusion 1 in one file of the original layout: the golden fixture's tensors, saved as the
original was.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import read_json
from tiny.seed import loud, seed1_config
from yaml_tables import read_tables

from seed_multimodal.compat.demo_recon import recon_script
from seed_multimodal.diffusion.base import empty_prompt
from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed.modeling import Seed1Tokenizer
from seed_multimodal.models.seed.single_file import load_single_file

TABLES = read_tables(__file__)
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data" / "seed1_sd_decode"
TEXT = "cond_stage_model.transformer."


def golden_tensors() -> dict[str, torch.Tensor]:
    """The recorded tensors, and those of the VAE's encoder, which the recording leaves out."""
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_file(GOLDEN / "weights.safetensors").items()
    }
    decoder = "first_stage_model.decoder."
    encoder = "first_stage_model.encoder."
    for name, value in list(tensors.items()):
        if name.startswith((f"{decoder}mid.", f"{decoder}norm_out.")):
            tensors[name.replace(decoder, encoder)] = value
        if name.startswith(f"{decoder}up.0.block.0."):
            for level in (0, 1):
                tensors[name.replace(f"{decoder}up.0.", f"{encoder}down.{level}.")] = value
    for name, (out, channels, side) in TABLES["convolutions"].items():
        tensors[f"first_stage_model.{name}.weight"] = torch.zeros(out, channels, side, side)
        tensors[f"first_stage_model.{name}.bias"] = torch.zeros(out)
    return tensors


class ModelCheckpoint:
    """In place of the class of the original's training program, which is not installed here."""


def save_as_original(file, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of the original's training program: its class is a key, numbers are NumPy's."""
    about = {"best_model_score": np.float64(0.1), "monitor": "loss"}
    content = {"epoch": 4, "state_dict": tensors, "callbacks": {ModelCheckpoint: about}}
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """`sd-v1-4.ckpt`, and the YAML of its sizes."""
    folder = tmp_path_factory.mktemp("single")
    save_as_original(folder / "sd-v1-4.ckpt", golden_tensors())
    write_sizes(folder / "tiny.yaml", hidden_size=32, num_attention_heads=1)
    return folder


def write_sizes(file, **text_sizes: int) -> dict[str, int]:
    """The YAML of the recorded sizes; returns those of the text encoder."""
    text_encoder = {**TABLES["text_encoder"], **text_sizes}
    sizes = read_json(GOLDEN / "config.json")["compvis"]
    params = {**sizes, "text_encoder": text_encoder}
    file.write_text(yaml.safe_dump({"model": {"params": params}}))
    return text_encoder


def test_single_file_has_the_tensors_of_the_diffusers_folder(original):
    # Then it draws as recorded (golden `seed1_sd_decode`).
    names = read_json(GOLDEN / "diffusers_key_map.json")
    tensors = golden_tensors()
    parts = load_single_file(original / "sd-v1-4.ckpt", torch.float32, original / "tiny.yaml")
    loaded_tensors = {
        f"{part}.{name}": value
        for part, key in (("unet", "denoiser"), ("vae", "vae"))
        for name, value in parts[key].state_dict().items()
    }
    assert loaded_tensors.keys() == names.keys()
    for name, value in loaded_tensors.items():
        assert torch.equal(value, tensors[names[name]].reshape(value.shape)), name


@torch.no_grad()
def test_single_file_has_the_text_encoder(tmp_path, original):
    # Without a tokenizer's files the empty prompt is one start token, then end tokens.
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = write_sizes(tmp_path / "wide.yaml", hidden_size=128, num_attention_heads=2)
    config = CLIPTextConfig(**sizes)
    clip = CLIPTextModel(config).eval()
    tensors = golden_tensors()
    without = {name: tensors[name] for name in tensors if not name.startswith("cond_stage")}
    encoder = {
        f"{TEXT}text_model.{name.removeprefix('text_model.')}": value
        for name, value in clip.state_dict().items()
    }
    file = save_as_original(tmp_path / "other.ckpt", without | encoder)
    loaded = load_single_file(file, torch.float32, tmp_path / "wide.yaml")["text_encoder"]
    expected = clip(torch.tensor([[16, *[17] * 76]]))[0]
    assert torch.allclose(empty_prompt(loaded, None, torch.device("cpu"), 77), expected, atol=1e-6)
    save_as_original(file, without)
    parts = load_single_file(file, torch.float32, original / "tiny.yaml")
    assert parts["text_encoder"] is None


def test_single_file_of_another_kind(tmp_path, original):
    # Its missing part or the wrong size is named.
    tensors = golden_tensors()
    unet = {name: value for name, value in tensors.items() if "first_stage" not in name}
    save_as_original(tmp_path / "unet.ckpt", unet)
    with pytest.raises(CheckpointError, match="vae"):
        load_single_file(tmp_path / "unet.ckpt", torch.float32, original / "tiny.yaml")
    with pytest.raises(CheckpointError, match="320"):  # Stable Diffusion's own sizes
        load_single_file(original / "sd-v1-4.ckpt", torch.float32)


def test_recon_finds_the_original_file(original, tmp_path):
    # `sd-v1-4.ckpt` next to the tokenizer, as the original demo has it: no second download.
    torch.manual_seed(0)
    wide = replace(seed1_config(), text_tokens=77, text_features_dim=32)
    loud(Seed1Tokenizer(wide)).eval().save_pretrained(tmp_path / "pretrained")
    (tmp_path / "pretrained" / "sd-v1-4.ckpt").symlink_to(original / "sd-v1-4.ckpt")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    flags = f"--model {tmp_path / 'pretrained'} --config {original / 'tiny.yaml'} --device cpu"
    flags += f" --image {tmp_path / 'red.png'} --ddim_steps 2 --n_samples 1 --H 16 --W 16"
    assert recon_script("", [*flags.split(), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "samples" / "0000.png").size == (16, 16)
