"""Opening a system for a test."""

from typing import Any

import seed_multimodal


def load(folder: Any, **options: Any) -> Any:
    """The system on the CPU, without a log."""
    return seed_multimodal.MultimodalSystem.from_pretrained(
        folder, device="cpu", log=None, **options
    )
