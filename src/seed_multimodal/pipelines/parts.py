"""Parts of a system, as its family's configuration declares them, and their files on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from seed_multimodal import hub


@dataclass(frozen=True)
class Part:
    """A part of a system, a folder or file.

    label: in messages.
    folder: default path in a system's folder; None: none.
    flag: help of its flag in `seed assemble`; "": no flag.
    required: whether that flag is.
    draws: drawing needs it.
    optional: the system is complete without it.
    """

    label: str
    folder: str | None = None
    flag: str = ""
    required: bool = False
    draws: bool = False
    optional: bool = False


def part(label: str, folder: str | None = None, **options: Any) -> Any:
    """A dataclass field for the path of a part; `options` of `Part`."""
    return field(default=None, metadata={"part": Part(label, folder, **options)})


def not_saved(default: Any = None, *, factory: Any = None) -> Any:
    """A dataclass field that is no key of `system.json`."""
    metadata = {"saved": False}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class Original(NamedTuple):
    """An original model, as a `system.json` in the repository's root would describe it.

    parts: path by part.
    settings: those that differ from the defaults.
    aliases: further names of this model, such as its hub name.
    """

    parts: Mapping[str, str]
    settings: Mapping[str, Any] = {}
    aliases: tuple[str, ...] = ()


# ---- files


def has_folder(folder: Path, *names: str) -> bool:
    """Whether one of these is a folder in `folder`."""
    return any((folder / name).is_dir() for name in names)


def existing_path(path: Path) -> Path | None:
    """A path as is or below the repository root; `.safetensors` may replace `.bin`."""
    existing = hub.locate(path)
    if existing is None and path.suffix == ".bin":
        existing = hub.locate(path.with_suffix(".safetensors"))
    return existing
