"""What an output folder was made with (`settings.json`, at the start) and what it holds (`manifest.json`, at the end).

A run that goes on in a folder must have the same tokenizer, transform, kind, fields and filters; batch size, number
of processes and device may differ. Any number of processes may finish at once: a lock orders them.
"""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.settings import changed_settings
from seed_multimodal.data.pretokenize.parts import LOCK, MANIFEST, is_of, part_folder, read_json, write_json
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.disk import lock, writing
from seed_multimodal.errors import DataError, counted

SETTINGS = "settings.json"
SUMS = ("read", "samples", "pictures", "bad", "lost_pictures")


def refuse_other_settings(save_dir: Path, settings: Mapping[str, Any], whole: bool = False) -> None:
    """Refuse a folder that was begun with another of these settings (`whole`: they are all; none may be missing).

    Raises:
        DataError: another setting, named, with both values.
    """
    known = read_json(save_dir / SETTINGS)
    if known is None:
        return
    keys = dict.fromkeys([*settings, *known] if whole else settings)
    differ = [key for key in keys if settings.get(key) != known.get(key)]
    if "tokenizer" in differ:
        theirs, ours = (str(one.get("tokenizer"))[:12] for one in (known, settings))
        raise DataError(f"{save_dir}: was begun with another tokenizer (weights {theirs}…, now {ours}…); codes of two "
                        "tokenizers do not mix: choose another --save_dir.")
    if "kind" in differ:  # other fields follow from it
        differ = ["kind"]
    changes = changed_settings({key: known[key] for key in differ if key in known},
                               {key: settings[key] for key in differ if key in settings})
    if differ:
        raise DataError(f"{save_dir}: was begun with other settings ({'; '.join(changes or differ)}); choose another "
                        "--save_dir, or the same settings.")


def agree_on_settings(save_dir: Path, settings: Mapping[str, Any]) -> None:
    """Note what the folder is made with, or check that it is the same.

    Raises:
        DataError: another setting, named, with both values; or parts without (readable) settings.
    """
    file = save_dir / SETTINGS
    with _locked(save_dir):
        if read_json(file) is None:
            if file.exists() or any(save_dir.glob(f"part-*/{MANIFEST}")):
                raise DataError(f"{file}: is missing or damaged, so that nobody knows what the parts beside it were "
                                "made with; choose another --save_dir.")
            write_json(file, settings)
    refuse_other_settings(save_dir, settings, whole=True)


def versions() -> dict[str, str]:
    """Of what computes codes and decodes pictures."""
    import PIL
    import torch

    from seed_multimodal import __version__

    return {"seed_multimodal": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "pillow": PIL.__version__}


@contextlib.contextmanager
def _locked(save_dir: Path) -> Iterator[None]:
    """While active, no other process is inside for this folder, which is made if it is not there."""
    with writing(save_dir, DataError):
        save_dir.mkdir(parents=True, exist_ok=True)
        with lock(save_dir / LOCK, remove=True):
            yield


def merge(save_dir: Path, units: Sequence[Unit]) -> dict[str, Any] | None:
    """Write `manifest.json` when every unit's part is finished, and return it; None: some are not yet, or were made of
    inputs that have changed since."""
    with _locked(save_dir):
        parts = [read_json(part_folder(save_dir, unit) / MANIFEST) for unit in units]
        finished = [part for unit, part in zip(units, parts, strict=True)
                    if part is not None and is_of(part, unit)]
        if len(finished) < len(units):
            return None
        total: dict[str, Any] = {key: sum(part.get(key, 0) for part in finished) for key in SUMS}
        dropped = Counter[str]()
        for part in finished:
            dropped.update(part["dropped"])
        settings = read_json(save_dir / SETTINGS) or {}
        manifest = {"settings": settings, **total, "dropped": dict(sorted(dropped.items())), "parts": [
            {"folder": part_folder(save_dir, unit).name, "source": part["source"], "samples": part["samples"],
             "tars": part["tars"], "made": part["made"]} for unit, part in zip(units, finished, strict=True)]}
        write_json(save_dir / MANIFEST, manifest)
        for unit in units:  # of processes that were killed just before they removed it
            (part_folder(save_dir, unit) / LOCK).unlink(missing_ok=True)
        return manifest


def summary(manifest: Mapping[str, Any], save_dir: Path) -> str:
    """A finished folder in one sentence or two."""
    tars = sum(len(part["tars"]) for part in manifest["parts"])
    text = (f"{save_dir}: {counted(manifest['samples'], 'record')} with {counted(manifest['pictures'], 'picture')} in "
            f"{counted(tars, 'tar')}, of {counted(manifest['read'], 'sample')} read")
    left_out = [f"{count:,} {reason}" for reason, count in manifest["dropped"].items()]
    if left_out:
        text += f"; filtered: {', '.join(left_out)}"
    if manifest["lost_pictures"]:
        text += f"; left out of documents: {counted(manifest['lost_pictures'], 'picture')} that cannot be read"
    if manifest["bad"]:
        text += f"; broken: {manifest['bad']:,} (named in the parts' {MANIFEST})"
    return text + "."
