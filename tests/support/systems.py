"""Opening a system for a test."""

import seed_multimodal


def load(folder, **options):
    """The system on the CPU, without a log."""
    return seed_multimodal.MultimodalSystem.from_pretrained(
        folder, device="cpu", log=None, **options
    )
