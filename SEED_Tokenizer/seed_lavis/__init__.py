"""SEED-2's, SEED-1's and LaVIT's tokenizer training on LAVIS: `register()` fills LAVIS's registry; see train.py."""

from __future__ import annotations

import importlib
import os


def register() -> None:
    """Register models, tasks, processors, builders, schedules and the runner in LAVIS."""
    for part in ("models", "processors", "datasets", "task", "runner"):
        importlib.import_module(f"seed_lavis.{part}")


def log(text: str) -> None:
    """Print a line in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
