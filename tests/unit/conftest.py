"""Tiny tokenizers, one per session."""

from pathlib import Path

import pytest
from hypothesis import settings
from random_images import noise

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.models.lavit.processing import LavitTokenizer
from seed_nano.train.words import train_text_tokenizer

# The same examples in each run, so that an unrelated change never meets a new failure.
settings.register_profile(
    "repeatable", max_examples=50, derandomize=True, deadline=None, database=None
)
settings.load_profile("repeatable")

TEXTS = [
    "USER: What is this animal?\nASSISTANT:It is a cat. It is a dog.",
    "Please draw a red apple, a blue house.",
    "Here is the picture.",
    "Hello, hello there! 12 345",
    "[INST] x [/INST]",
] * 20


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_text_tokenizer(
        MultimodalTokenizer, TEXTS, folder, vocab_size=330, n_codes=24, tokens_per_image=5
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> MultimodalTokenizer:
    return MultimodalTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def seedx_tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    """A tokenizer for SEED-X: 4 of 6 image tokens per image, a grid of 16 for boxes."""
    from tiny.seed_x import write_seed_x_tokenizer

    return write_seed_x_tokenizer(tmp_path_factory.mktemp("seedx_tokenizer"))


@pytest.fixture(scope="session")
def released_seed_x(tmp_path_factory) -> Path:
    """`pretrained/` and `configs/` of a tiny SEED-X in the original layout, without sizes next to
    the weights."""
    from tiny.seed_x import build_released_seed_x, forget_sizes, write_seed_x_configs

    folder = tmp_path_factory.mktemp("released")
    build_released_seed_x(folder / "pretrained")
    write_seed_x_configs(folder)
    forget_sizes(folder / "pretrained")
    return folder


@pytest.fixture(scope="session")
def lavit_tokenizer(tmp_path_factory) -> LavitTokenizer:
    """A tokenizer for LaVIT: 330 text tokens, 24 codes, at most 6 per image."""
    return train_text_tokenizer(
        LavitTokenizer,
        TEXTS,
        tmp_path_factory.mktemp("lavit_tokenizer"),
        330,
        n_codes=24,
        tokens_per_image=6,
    )


@pytest.fixture
def image(tmp_path) -> str:
    noise(1).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def run_seed(capsys, tmp_path, monkeypatch):
    """Runs a `seed` command on a model in an empty folder; returns exit code, lines of stdout,
    stderr."""
    from seed_multimodal.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(model, *flags) -> tuple[int, list[str], str]:
        code = main([*map(str, flags), *f"--model {model} --device cpu".split()])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run
