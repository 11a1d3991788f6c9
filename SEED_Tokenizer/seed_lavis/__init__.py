"""Training of SEED-2's, SEED-1's and LaVIT's tokenizers on LAVIS; see train.py.

`register()` fills LAVIS's registry.

options      keys of the YAML's sections `model` and `run`
models       the models by their LAVIS names, and their initial weights
datasets     dataset builders; image and caption processors
runner       the runner, a stage as a task of the library's trainer, held-out losses
compat       the only import of LAVIS
"""

from __future__ import annotations

import importlib
import os

from seed_multimodal.plugins import import_entry, registered


def register() -> None:
    """Register models, tasks, processors, builders, schedules and the runner in LAVIS; then what
    other packages register, by entry points of the group `seed_multimodal.lavis`."""
    for part in ("models", "datasets", "runner"):
        importlib.import_module(f"seed_lavis.{part}")
    for entry in registered("lavis").values():
        import_entry(entry)


def log(text: str) -> None:
    """Print a line in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
