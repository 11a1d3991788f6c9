"""Settings files: all of ours load, overrides apply, mistakes are one sentence that names the nearest key."""

from pathlib import Path

import pytest

from seed_multimodal.errors import ConfigError
from seed_nano.train.config import load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "nano"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_file_loads(name: str) -> None:
    config = load_config(CONFIGS / name, ["train_vae.steps=7"])
    assert config.train_vae.steps == 7 and config.image_size == 64


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("train_vea: {steps: 3}\n")
    with pytest.raises(ConfigError, match="train_vae"):
        load_config(file)


def test_wrong_type_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("pool: many\n")
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(file)


@pytest.mark.parametrize(("change", "sentence"), [
    ("image_size=40", "image_size must be a multiple of 16"), ("image_size=16", "image_size must be at least 32"),
    ("clip.heads=5", r"clip.width must be a multiple of 5 \(clip.heads\), not 48"),
    ("vae.channels=[8,12]", "vae.channels must be a multiple of 8"),
    ("unet.channels=[]", "unet.channels must be a multiple of 8"), ("unet.layers=0", "layers must be at least 1"),
    ("tokenizer.codes=100", "tokenizer.codes must be a multiple of 32"),
    ("llm.heads=3", "llm.width must be a multiple of 6")])
def test_sizes_that_do_not_fit_are_refused_before_the_first_stage(change: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(CONFIGS / "test.yaml", [change])
    load_config(CONFIGS / "test.yaml", ["tokenizer.codes=100", "tokenizer.sections=false", "image_size=48"])
