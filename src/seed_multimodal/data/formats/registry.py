"""Record formats of other packages, by name: entry points of the group `seed_multimodal.formats`.

    [project.entry-points."seed_multimodal.formats"]
    mine = "my_package.records:open_mine"

An entry point is a function `open_mine(path, **options)` that returns a `record.RecordFile`; `path` is None where the
configuration names no files. Data workers and the Hydra and LAVIS programs find it by name. For image-caption pairs the
file's `pair_keys`, if it has any, are arguments of `pairs.PairReader`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import RecordFile
from seed_multimodal.settings import check_keys

GROUP = "seed_multimodal.formats"


@cache
def registered() -> dict[str, EntryPoint]:
    """The registered formats."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def open_registered(name: str, path: str | Path | None, options: Mapping[str, Any]) -> RecordFile:
    """The records of a registered format.

    Raises:
        ConfigError: an option that its opener does not have (the nearest is named).
    """
    opener = registered()[name].load()
    check_keys(options, list(inspect.signature(opener).parameters)[1:], f"options of format {name}")
    file: RecordFile = opener(path, **options)
    return file
