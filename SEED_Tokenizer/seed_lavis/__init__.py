"""SEED-2's, SEED-1's and LaVIT's tokenizer training on LAVIS: its parts, registered.

`register()` fills LAVIS's registry; everything else happens through LAVIS's `Config` and a YAML file, see train.py.
The models are those of `seed_multimodal.seed` and `lavit`; the loop, the data and the weights are the library's too.
"""

from __future__ import annotations

import importlib

PARTS = ("models", "seed1", "lavit", "tasks", "processors", "builders", "schedules", "runner")


def register() -> None:
    """Put our models, tasks, processors, builders and runner into LAVIS's registry.

    Raises:
        LavisMissing: salesforce-lavis is not installed.
    """
    for part in PARTS:
        importlib.import_module(f"seed_lavis.{part}")
