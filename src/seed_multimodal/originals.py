"""The originals' repositories, from the `weights.yaml` next to each family's `spec.py`.

    8b:                                    # name of the part, for `seed fetch` and mirrors
      folder: pretrained/seed_llama_8b_sft
      hub: AILab-CVC/seed-llama-8b-sft

Further keys are the fields of `OriginalPart`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from seed_multimodal import plugins
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings

FILE = "weights.yaml"
# Shell patterns of the files of a model in one folder.
WEIGHT_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class OriginalPart:
    """A model of the original repositories.

    Attributes:
        name: key in `weights.yaml`.
        folder: below the repository root.
        hub: name on the hub, "" for none.
        files: what to fetch from the hub, as shell patterns; without "/" in any of them, files of
            the root folder only.
        mirrors: further hub names with the same files, tried in this order; "owner/name/folder" for
            a folder of a repository.
        urls: further files of the folder and where they are published (one URL each).
        by_hand: further files that no program can download, and where a person can.
        needs: names of parts that are fetched before this one.
        convert: function that makes the folder from those, "module:function".
        sha256: checksums of files that are known independently of the hub.
    """

    name: str
    folder: str
    hub: str = ""
    files: tuple[str, ...] = WEIGHT_PATTERNS
    mirrors: tuple[str, ...] = ()
    urls: dict[str, str] = field(default_factory=dict)
    by_hand: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    convert: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What is downloaded, for messages."""
        if self.convert:
            return f"{' and '.join(self.needs)} (converted)"
        return " and ".join(name for name in (self.hub, *self.urls) if name)


@cache
def original_parts() -> dict[str, OriginalPart]:
    """The parts of all families by name.

    Raises ConfigError: a damaged file, or a name that two families share.
    """
    parts: dict[str, OriginalPart] = {}
    for file in _files():
        for name, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            label = f"{file}: {name}"
            if name in parts:
                raise ConfigError(f"{label}: another family has a part of this name.")
            parts[name] = read_settings(OriginalPart, {"name": name, **values}, label)
    return parts


def _files() -> list[Path]:
    """The files of the library's families, then those of other packages' families."""
    files = sorted(Path(plugins.__file__).parent.glob(f"models/*/{FILE}"))
    for entry in plugins.registered("families").values():
        try:
            spec = importlib.util.find_spec(entry.module)
        except ImportError:
            continue  # `models.registry.families` warns about it
        if spec is not None and spec.origin is not None:
            files.append(Path(spec.origin).with_name(FILE))
    return [file for file in files if file.is_file()]


def part_of_hub(hub_name: str | Path) -> OriginalPart | None:
    """The part with this name on the hub."""
    named = (part for part in original_parts().values() if part.hub)
    return next((part for part in named if part.hub == str(hub_name)), None)


def part_of(name: str | Path) -> OriginalPart | None:
    """The part with this name on the hub, or with its own folder at this path (in any
    repository)."""
    end = Path(name).parts[-2:]
    for part in original_parts().values():
        has_own_folder = part.folder != "pretrained"
        if has_own_folder and end == Path(part.folder).parts:
            return part
    return part_of_hub(name)


def origin(path: Path) -> tuple[OriginalPart, str]:
    """The part that holds a path below the repository root, and the path in its folder.

    Raises ConfigError: no part does.
    """
    parts = [part for part in original_parts().values() if _holds(part, path)]
    if not parts:
        raise ConfigError(f"{path}: no part of a {FILE} holds it.")
    # The innermost folder; of two parts in the same one, that on the hub.
    source = max(parts, key=lambda part: (len(part.folder), bool(part.hub)))
    return source, path.relative_to(source.folder).as_posix()


def _holds(part: OriginalPart, path: Path) -> bool:
    """Whether a path is a part's folder, or begins in it as one of its patterns does."""
    if not path.is_relative_to(part.folder):
        return False
    inner = path.relative_to(part.folder).parts
    first_patterns = [pattern.partition("/")[0] for pattern in part.files]
    return not inner or any(fnmatch(inner[0], pattern) for pattern in first_patterns)
