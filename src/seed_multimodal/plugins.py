"""Objects that other packages register by an entry point of a group:

    [project.entry-points."seed_multimodal.families"]
    mine = "my_package.spec:SPEC"

Groups: `families` (`models.registry`), `formats` (`data.formats.contents`), `conditioners`
(`diffusion.conditioner`), `benchmarks` (`evaluation.benchmark`), `detectors`
(`evaluation.detection`), `rewards` (`rl.rewards`), `tokenizers`
(`recipes.seed.train_detokenizer`), `language_models` (`language.llm`), `worlds` (`pipelines.world`)
and `lavis` (models of the LAVIS application, `seed_lavis.register`). A checkout of this repository
needs no installation: the table in its own `pyproject.toml` counts as well.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from seed_multimodal.errors import ConfigError

PROJECT = "seed-multimodal"


def registered(kind: str) -> dict[str, EntryPoint]:
    """Entry points of the group `seed_multimodal.<kind>` by name."""
    group = f"seed_multimodal.{kind}"
    entries = {entry.name: entry for entry in entry_points(group=group)}
    # The checkout's own table also replaces what an earlier installation of it wrote.
    for name, value in _checkout_table().get(group, {}).items():
        entries[name] = EntryPoint(name, value, group)
    return entries


def import_entry(entry: EntryPoint) -> Any:
    """The object of an entry point. Raises ConfigError: it cannot be imported."""
    try:
        return entry.load()
    except Exception as error:
        raise ConfigError(
            f"{entry.value}: {entry.name} of {entry.group} cannot be imported ({error})."
        ) from error


def _checkout_table() -> dict[str, dict[str, str]]:
    """Entry points in the `pyproject.toml` of the checkout with this package; without one, none."""
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        return {}
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != PROJECT:  # the package lies in another project
        return {}
    return project.get("entry-points", {})
