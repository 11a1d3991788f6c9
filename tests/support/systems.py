"""Opening a system for a test."""

from pathlib import Path
from typing import Any

from seed_multimodal import MultimodalSystem


def load(folder: str | Path, **options: Any) -> Any:
    """The system on the CPU, without a log."""
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None, **options)
