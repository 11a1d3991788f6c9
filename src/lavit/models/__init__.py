"""LaVIT's original names, for programs and notebooks in this folder: `from models import
build_model`."""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from seed_multimodal.compat.lavit import (  # noqa: E402
    LaVITDetokenizer,
    LaVITforGeneration,
    LaVITforUnderstanding,
    LaVITImageProcessor,
    LaVITQuestionProcessor,
    build_model,
)

__all__ = [
    "LaVITDetokenizer",
    "LaVITImageProcessor",
    "LaVITQuestionProcessor",
    "LaVITforGeneration",
    "LaVITforUnderstanding",
    "build_model",
]
