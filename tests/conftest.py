"""What several rooms' tests share: a tiny random system (tests/systems/tiny_system.py), built once per session.

Tests read it; one that damages a system works on a copy.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_system  # found through `pythonpath` in pyproject.toml; slow to import, so only where it is used

    return tiny_system.build(tmp_path_factory.mktemp("tiny_system"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path):
    from seed_multimodal.systems.seed_llama import SeedLlama

    return SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)
