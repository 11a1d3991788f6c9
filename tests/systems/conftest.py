"""A tiny random system, built once per session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import tiny_system  # noqa: E402


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_system.build(tmp_path_factory.mktemp("tiny_system"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path):
    from seed_multimodal.systems.seed_llama import SeedLlama

    return SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)
