"""The metadata of an installed package, for tests of entry points."""

from collections.abc import Mapping
from pathlib import Path


def install(site: Path, name, entries: Mapping[str, Mapping[str, str]]):
    """Write it into `site`, as an installation does; `entries`: group → name → object."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, objects in entries.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in objects.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
