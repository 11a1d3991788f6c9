"""The originals' weights, from the `weights.yaml` next to each family's `spec.py`.

parts:
  8b:                                  # a name for `seed fetch` and mirrors
    folder: pretrained/seed_llama_8b_sft
    hub: AILab-CVC/seed-llama-8b-sft   # and further fields of `Part`
systems:
  8b:                                  # as a `system.json` in the repository's root
    system: seed_llama
    llm: pretrained/seed_llama_8b_sft
    aliases: [AILab-CVC/seed-llama-8b-sft]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from seed_multimodal import plugins
from seed_multimodal.config import read_table
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings

FILE = "weights.yaml"
FAMILIES = ("seed", "seed_x", "lavit")  # folders of `models`, in the order of messages
# Systems in the repository: name -> folder.
SHIPPED_SYSTEMS = {name: f"pretrained/{name}" for name in ("nano", "nano-x", "nano-lavit")}
# Shipped parts by family, for messages about missing ones.
SHIPPED_LLMS = (
    "pretrained/nano/seed_llama (SEED-LLaMA), pretrained/nano-x/llm (SEED-X), "
    "pretrained/nano-lavit/llm (LaVIT)"
)
SHIPPED_TOKENIZERS = (
    "shipped are pretrained/nano/seed_tokenizer (SEED-LLaMA), pretrained/nano-x/tokenizer (SEED-X) "
    "and pretrained/nano-lavit/words (LaVIT)"
)
# Files of a language model's checkpoint.
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
AGENT_CONFIG = "agent.json"  # of a tuned SEED-X: sizes of the resamplers, LoRA
VISUAL_WEIGHTS = "visual_weight.safetensors"  # LaVIT's token merger and projection
# Suffixes of weights; a `.safetensors` file stands for a convertible one of the same name, see
# `seed convert`.
CONVERTIBLE = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *CONVERTIBLE)
# Shell patterns of the files of a model in one folder.
WEIGHT_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A repository of the originals, or a folder that is made of others.

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

    def files_at(self, path: str) -> tuple[str, ...]:
        """Shell patterns of the files at a path in the folder; ".": of all."""
        return self.files if path == "." else (path, f"{path}/*")

    def has(self, path: Path) -> bool:
        """Whether a path below the repository root is the folder, or begins in it as a pattern."""
        if not path.is_relative_to(self.folder):
            return False
        inner = path.relative_to(self.folder).parts
        first_patterns = [pattern.partition("/")[0] for pattern in self.files]
        return not inner or any(fnmatch(inner[0], pattern) for pattern in first_patterns)


class Catalogue(NamedTuple):
    """Parts by name, and the keys of the original systems' `system.json` by name."""

    parts: dict[str, Part]
    systems: dict[str, Mapping[str, Any]]


@cache
def catalogue() -> Catalogue:
    """The parts and systems of all families.

    Raises ConfigError: a damaged file, or a name that two families share.
    """
    entries = Catalogue({}, {})
    for file in _files():
        content = read_table(file)
        parts = {
            name: read_settings(Part, {"name": name, **values}, f"{file}: {name}")
            for name, values in content["parts"].items()
        }
        systems = content.get("systems", {})
        for name in (parts.keys() & entries.parts) | (systems.keys() & entries.systems):
            raise ConfigError(f"{file}: {name}: another family has a part of this name.")
        entries.parts.update(parts)
        entries.systems.update(systems)
    return entries


def _files() -> list[Path]:
    """The files of the library's families, then those of other packages' families."""
    models = Path(plugins.__file__).parent / "models"
    files = [models / family / FILE for family in FAMILIES]
    for entry in plugins.registered("families").values():
        try:
            spec = importlib.util.find_spec(entry.module)
        except ImportError:
            continue  # `models.registry.families` warns about it
        if spec is not None and spec.origin is not None:
            files.append(Path(spec.origin).with_name(FILE))
    return [file for file in files if file.is_file()]


def original_name(name: str) -> str:
    """The short name of an original system by that name or an alias; "": none."""
    for short, values in catalogue().systems.items():
        if name.lower() == short or name in values.get("aliases", ()):
            return short
    return ""


def part_of(name: str | Path) -> tuple[Part, str] | None:
    """The part with a name on the hub, or that holds a path below `pretrained/` (of any
    repository); and the path in its folder."""
    # 1. By its name.
    parts = catalogue().parts.values()
    for part in parts:
        if part.hub and part.hub == str(name):
            return part, "."

    # 2. By its folder: the innermost; of two parts in the same one, that on the hub.
    above, separator, inner = str(name).rpartition("pretrained/")
    if not separator or (above and not above.endswith("/")):
        return None
    path = Path("pretrained", inner)
    holders = [part for part in parts if part.has(path) and path != Path("pretrained")]
    if not holders:
        return None
    part = max(holders, key=lambda part: (len(part.folder), bool(part.hub)))
    return part, path.relative_to(part.folder).as_posix()


def weight_files(path: Path, suffixes: Sequence[str] = WEIGHT_SUFFIXES) -> list[Path]:
    """The files with weights at or below a path."""
    files = [path] if path.is_file() else path.rglob("*")
    return [file for file in files if file.suffix in suffixes]


def download_advice(name: str) -> str:
    """How to get a part of an original, for messages."""
    part = catalogue().parts[name]
    return f"seed fetch {name} downloads {part.source} into {part.folder}"
