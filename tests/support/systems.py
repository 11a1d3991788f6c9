"""Opening a system for a test."""

from typing import Any

from seed_multimodal import MultimodalSystem


def load(folder: Any, **options: Any) -> Any:
    """The system on the CPU, without a log."""
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None, **options)
