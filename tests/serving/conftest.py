"""The tiny random system of tests/systems, and a small picture."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SYSTEMS = Path(__file__).resolve().parents[1] / "systems"
if str(SYSTEMS) not in sys.path:
    sys.path.insert(0, str(SYSTEMS))

import tiny_system  # noqa: E402


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_system.build(tmp_path_factory.mktemp("tiny_system"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path):
    from seed_multimodal.systems.seed_llama import SeedLlama

    return SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)


@pytest.fixture()
def picture() -> Image.Image:
    """Stripes, 40 x 30."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, ::4] = (250, 40, 60)
    pixels[::5] = (20, 90, 200)
    return Image.fromarray(pixels)


@pytest.fixture()
def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
