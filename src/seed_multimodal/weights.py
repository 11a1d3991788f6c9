"""Reading and writing weights: safetensors, or old torch files through `weights_only=True`, never arbitrary pickles.

All state dicts are loaded by `assign_strictly`. Missing tensors or other shapes raise an error; unknown tensors raise
an error in our own files and are ignored with a warning in `foreign` ones.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seed_multimodal.disk import atomic_path, read_json_object
from seed_multimodal.errors import CheckpointError, SeedWarning, first_line, pluralize

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
_WRAPPERS = ("model", "state_dict", "module")


@dataclass
class LoadReport:
    """Result of a load: names of loaded, missing and ignored tensors."""

    source: str
    loaded: list[str]
    missing: list[str]
    ignored: list[str]

    def describe(self) -> str:
        """One line with the counts."""
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.missing)} not in the file, "
            f"{len(self.ignored)} in the file ignored."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" …" if len(names) > 5 else "")


def load_state_dict(path: str | Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors`, `.pt`, `.pth` or `.bin` file, on the CPU; wrappers like `{"model": …}` are
    removed. `mapped`: memory-mapped if the format allows.

    Raises CheckpointError: missing, truncated or unsafe file, or one without tensors.
    """
    loaded: Any = read_file(Path(path), mapped)
    for wrapper in _WRAPPERS:  # they may be nested
        loaded = loaded[wrapper] if isinstance(loaded.get(wrapper), Mapping) else loaded
    tensors = {
        name: value
        for name, value in loaded.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{path}: contains no tensors.")
    return tensors


def load_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder with one or several. Raises CheckpointError: none."""
    source = Path(source)
    single = [
        file for file in (source, *(source / name for name in SINGLE_FILES)) if file.is_file()
    ][:1]
    files = (
        single or sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    )
    if not files:
        raise CheckpointError(f"{source}: no weights (*.safetensors or *.bin).")
    return {
        name: value for file in files for name, value in load_state_dict(file, mapped=True).items()
    }


def missing_weights(folder: Path, name: str = "model.safetensors") -> Path | None:
    """The first file that a model's folder lacks: `config.json`, a shard that an index lists, or any weights (then
    `name`)."""
    if not (folder / "config.json").is_file():
        return folder / "config.json"
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(read_json_object(index).get("weight_map", {}).values()))
        return next((folder / shard for shard in shards if not (folder / shard).is_file()), None)
    some = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    return None if some else folder / name


def read_file(file: Path, mapped: bool = False) -> Mapping[str, object]:
    """The mapping in a safetensors or torch file; arguments and errors as of `load_state_dict`."""
    if not os.path.isfile(file):  # Path.is_file raises for a name too long
        raise CheckpointError(f"{file}: no such weights file.")
    try:
        loaded = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(
                file,
                map_location="cpu",
                weights_only=True,
                mmap=mapped and zipfile.is_zipfile(file),
            )
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: rejected, because it has unsafe pickle content or is damaged; "
            f"re-save it as safetensors from a source you trust."
        ) from error
    except Exception as error:  # torch's reader raises errors of many types for wrong bytes
        raise CheckpointError(
            f"{file}: not a complete weights file ({first_line(error)})."
        ) from error
    return loaded if isinstance(loaded, Mapping) else {"": loaded}


def save_state_dict(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write safetensors atomically. Raises OSError: disk error; the old file stays."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    content, storages = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        tensor = value.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        content[name] = (
            tensor.clone() if storage in storages else tensor
        )  # safetensors refuses shared storage
        storages.add(storage)
    with atomic_path(file) as scratch:
        try:
            save_file(content, scratch, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(errno.EIO, first_line(error)) from error
        mask = os.umask(0o022)  # reading requires setting it
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)  # safetensors creates owner-only files
    return file


def save_torch(content: object, path: str | Path) -> None:
    """Atomic `torch.save`. Raises OSError: disk error."""
    with atomic_path(path) as scratch:
        try:
            torch.save(content, scratch)
        except RuntimeError as error:
            raise OSError(errno.EIO, first_line(error)) from error


def assign_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    *,
    foreign: bool = False,
    device: str | torch.device = "cpu",
) -> LoadReport:
    """Load `state` into `module`, accounting for every name. A module on the meta device gets the tensors themselves,
    moved to `device` in its precision; otherwise they are copied.

    Raises CheckpointError: nothing matches, a shape differs, or a name outside the shell patterns is missing or
    unexpected (a warning for a `foreign` file).
    """
    own = module.state_dict()
    report = LoadReport(
        str(source),
        [name for name in own if name in state],
        [name for name in own if name not in state],
        [name for name in state if name not in own],
    )
    if not report.loaded:
        raise CheckpointError(
            f"{source}: a checkpoint of another model: none of its {len(state)} tensors "
            f"(first: {next(iter(state), 'none')!r}) belongs to {type(module).__name__}."
        )
    shapes = [n for n in report.loaded if own[n].shape != state[n].shape]
    if shapes:
        name = shapes[0]
        raise CheckpointError(
            f"{source}: {len(shapes)} tensors have another size, first {name!r}: the file has "
            f"{tuple(state[name].shape)}, the model needs {tuple(own[name].shape)}."
        )
    refuse_tensors(report.missing, allow_missing, source, "missing from the file")
    if foreign:
        warn_tensors(report.ignored, allow_unexpected, source)
    else:
        refuse_tensors(report.ignored, allow_unexpected, source, "unknown to the model")
    bare = {name for name in report.loaded if own[name].is_meta}
    module.load_state_dict(
        {name: state[name].to(device, own[name].dtype).contiguous() for name in bare},
        strict=False,
        assign=True,
    )
    module.load_state_dict(
        {name: state[name] for name in report.loaded if name not in bare}, strict=False
    )
    return report


def _outside(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that match no shell pattern."""
    known = list(patterns)
    return [name for name in names if not any(fnmatch.fnmatchcase(name, one) for one in known)]


def warn_tensors(names: Iterable[str], known: Iterable[str], source: str | Path) -> None:
    """Warn about unused tensors in a file that match no shell pattern of `known`."""
    unlisted = _outside(names, known)
    if unlisted:
        warnings.warn(
            f"{source}: ignored {pluralize(len(unlisted), 'tensor')} unknown to the model: "
            f"{_listed(unlisted)}.",
            SeedWarning,
            stacklevel=3,
        )


def fingerprint(model: nn.Module, *, frozen: bool = False) -> list[float]:
    """Four weights of each parameter (`frozen`: only of frozen ones), for `same_fingerprint`."""
    found = []
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and not (frozen and parameter.requires_grad):
            flat = parameter.detach().flatten()
            found.append(
                torch.stack([flat[number * (len(flat) - 1) // 3].float() for number in range(4)])
            )
    return torch.cat(found).tolist() if found else []


def same_fingerprint(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether two `fingerprint` are of the same model, up to rounding to 16 bits."""
    return len(before) == len(now) and all(
        math.isclose(one, other, rel_tol=0.005, abs_tol=1e-7)
        for one, other in zip(before, now, strict=True)
    )


def refuse_tensors(
    names: Iterable[str], allowed: Iterable[str], source: str | Path, what: str
) -> None:
    """Raise CheckpointError "SOURCE: N tensors are WHAT: …" for names that match no shell pattern of `allowed`."""
    bad = _outside(names, allowed)
    if bad:
        raise CheckpointError(f"{source}: {len(bad)} tensors are {what}: {_listed(bad)}.")
