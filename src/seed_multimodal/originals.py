"""The originals' repositories, from the `weights.yaml` next to each family's `spec.py`.

    8b:                                    # name of the part, for `seed fetch` and mirrors
      folder: pretrained/seed_llama_8b_sft
      hub: AILab-CVC/seed-llama-8b-sft

Further keys are the fields of `OriginalPart`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
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
        remark: what else it needs, for messages.
        files: what to fetch from the hub, as shell patterns; without "/" in any of them, files of
            the root folder only.
        mirrors: further hub names with the same files, tried in this order; "owner/name/folder" for
            a folder of a repository.
        urls: further files of the folder and where they are published.
        by_hand: further files that no program can download, and where a person can.
        needs: names of parts that are fetched before this one.
        convert: function that makes the folder from those, "module:function".
        sha256: checksums of files that are known independently of the hub.
    """

    name: str
    folder: str
    hub: str = ""
    remark: str = ""
    files: tuple[str, ...] = WEIGHT_PATTERNS
    mirrors: tuple[str, ...] = ()
    urls: dict[str, str] = field(default_factory=dict)
    by_hand: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    convert: str = ""
    sha256: dict[str, str] = field(default_factory=dict)


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
    return next((part for part in original_parts().values() if part.hub == str(hub_name)), None)


def origin(path: Path) -> tuple[OriginalPart, str]:
    """The part that holds a path below the repository root, and the path in its folder."""
    parts = [part for part in original_parts().values() if path.is_relative_to(part.folder)]
    # The innermost folder; of two parts in the same one, that on the hub.
    source = max(parts, key=lambda part: (len(part.folder), bool(part.hub)))
    return source, path.relative_to(source.folder).as_posix()
