"""Reading and writing weights: safetensors, or old torch files through `weights_only=True`, never arbitrary pickles.

`assign_strictly` is the only place that puts a state dict into a module. A needed tensor that is missing or of another
shape is refused; one that nobody needs is refused in our own files and left out with a warning in files made elsewhere.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, replacing_path, set_default_mode
from seed_multimodal.errors import CheckpointError, SeedWarning, counted, first_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
_WRAPPERS = ("model", "state_dict", "module")


@dataclass
class LoadReport:
    """Result of a load: names of parameters filled, left as they were, ignored in the file."""

    source: str
    loaded: list[str]
    missing: list[str]
    ignored: list[str]

    def describe(self) -> str:
        """One line: counts, then the names grouped by their first part."""
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.missing)} not in the file, "
                 f"{len(self.ignored)} in the file ignored"]
        for what, names in (("not in the file", self.missing), ("ignored", self.ignored)):
            parts += [f"{what}: {grouped(names)}"] if names else []
        return "; ".join(parts) + "."


def grouped(names: Iterable[str]) -> str:
    """`Qformer (255), temp (1)`: how many names begin with which first part."""
    return ", ".join(f"{name} ({count})" for name, count in Counter(name.split(".")[0] for name in names).items())


def load_state_dict(path: str | Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Read a flat name → tensor mapping from `.safetensors`, `.pt`, `.pth` or `.bin`, on CPU.

    Wrapped checkpoints (`{"model": …}`, `{"state_dict": …}`) are unwrapped. With `mapped` tensors of a torch file are
    views of the file where its format allows, not copies in memory.

    Raises:
        CheckpointError: missing, truncated or unsafe file, or one that holds no tensors.
    """
    loaded: Any = read_file(Path(path), mapped)
    for wrapper in _WRAPPERS:  # one may be wrapped in the next
        loaded = loaded[wrapper] if isinstance(loaded.get(wrapper), Mapping) else loaded
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors.")
    return tensors


def weight_files(source: str | Path) -> list[Path]:
    """Weights files of a checkpoint: the file itself, or those of a folder, by its index if it has one.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such checkpoint.")
    index = next((source / name for name in INDEXES if (source / name).is_file()), None)
    if index is not None:
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{index}: not an index of shards: it holds no 'weight_map'.")
        files = sorted({source / str(name) for name in places.values()})
    else:
        files = [source / name for name in SINGLE if (source / name).is_file()][:1]
        files = files or sorted([*source.glob("*.safetensors"), *source.glob("pytorch_model*.bin")])
    if not files:
        raise CheckpointError(f"{source}: there are no weights (*.safetensors or *.bin) in it.")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{missing}: this shard is missing, although {index} names it.")
    return files


def load_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file or of a folder with one or several, mapped where the format allows; raises as
    `weight_files` and `load_state_dict`."""
    return {name: value for file in weight_files(source) for name, value in load_state_dict(file, mapped=True).items()}


def read_file(file: Path, mapped: bool = False) -> Mapping[str, object]:
    """The mapping in a safetensors or torch file, tensors on the CPU; `mapped` as of `load_state_dict`.

    Raises:
        CheckpointError: a missing, truncated or unsafe file, or no mapping in it.
    """
    if not os.path.isfile(file):  # Path.is_file raises for a name too long
        raise CheckpointError(f"{file}: there is no such weights file.")
    try:
        loaded = load_file(file) if file.suffix == ".safetensors" else _read_torch(file, mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, because it holds more than tensors (unsafe pickle content) or is damaged; "
            f"re-save it as safetensors from a source you trust.") from error
    except Exception as error:  # torch's reader raises errors of many types for wrong bytes
        raise CheckpointError(f"{file}: not a complete weights file ({first_line(error)}).") from error
    return loaded if isinstance(loaded, Mapping) else {"": loaded}


def _read_torch(file: Path, mapped: bool) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError as error:  # the older format cannot be mapped
        if not mapped or "mmap" not in str(error):
            raise
    return torch.load(file, map_location="cpu", weights_only=True)


def save_state_dict(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write safetensors, flushed, whole or not at all. Raises OSError: the disk refuses; what was there stays."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {name: value.detach().contiguous().cpu().clone() for name, value in tensors.items()}
    with replacing_path(file) as scratch:
        try:
            save_file(content, scratch, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(errno.EIO, first_line(error)) from error
        set_default_mode(scratch)
    return file


def save_torch(content: object, path: str | Path) -> None:
    """`torch.save` into a file, flushed, whole or not at all. Raises OSError: the disk refuses."""
    with replacing_path(path) as scratch:
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
    """Put `state` into `module` and account for every name.

    A module on the meta device takes the tensors themselves, moved to `device` and converted to its precision (views
    of a `mapped` file stay views where nothing changes). Any other module copies them.

    Args:
        allow_missing, allow_unexpected: shell patterns of names that may be absent from the file, and of those in it
            that are left out.
        foreign: a file made elsewhere: other names are left out, too, with a warning that names and counts them.

    Raises:
        CheckpointError: nothing matches, a shape differs, or a name outside the patterns is missing or (unless
            `foreign`) unexpected.
    """
    own = module.state_dict()
    report = LoadReport(str(source), [name for name in own if name in state],
                        [name for name in own if name not in state], [name for name in state if name not in own])
    if not report.loaded:
        raise CheckpointError(
            f"{source}: a checkpoint of another model: none of its {len(state)} tensors "
            f"(first: {next(iter(state), 'none')!r}) belongs to {type(module).__name__}.")
    shapes = [n for n in report.loaded if own[n].shape != state[n].shape]
    if shapes:
        name = shapes[0]
        raise CheckpointError(f"{source}: {len(shapes)} tensors have another size, first {name!r}: the file has "
                              f"{tuple(state[name].shape)}, the model needs {tuple(own[name].shape)}.")
    refuse_tensors(report.missing, allow_missing, source, "missing from the file")
    if foreign:
        warn_tensors(report.ignored, allow_unexpected, source)
    else:
        refuse_tensors(report.ignored, allow_unexpected, source, "unknown to the model")
    bare = {name for name in report.loaded if own[name].is_meta}
    module.load_state_dict({name: _placed(state[name], device, own[name].dtype) for name in bare}, strict=False,
                           assign=True)
    module.load_state_dict({name: state[name] for name in report.loaded if name not in bare}, strict=False)
    return report


def _placed(value: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """`value` itself if it lies so already; numbers that have no precision to convert are copied, so that a few of them
    do not keep a whole file mapped."""
    placed = value.to(device, dtype)
    return placed.contiguous() if placed.is_floating_point() else placed.clone()


def _outside(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that no shell pattern covers."""
    known = list(patterns)
    return [name for name in names if not any(fnmatch.fnmatchcase(name, one) for one in known)]


def warn_tensors(names: Iterable[str], known: Iterable[str], source: str | Path) -> None:
    """Warn of tensors in a file that nothing uses and no shell pattern of `known` covers."""
    unlisted = _outside(names, known)
    if unlisted:
        shown = ", ".join(map(repr, unlisted)) if len(unlisted) <= 5 else grouped(unlisted)
        warnings.warn(f"{source}: {counted(len(unlisted), 'tensor')} that the model does not know "
                      f"{'was' if len(unlisted) == 1 else 'were'} left out: {shown}.", SeedWarning, stacklevel=3)


def some_weights(model: nn.Module, *, frozen: bool = False) -> list[float]:
    """Four weights of each parameter (`frozen`: of those that are not trained), for `same_weights`."""
    found = []
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and not (frozen and parameter.requires_grad):
            flat = parameter.detach().flatten()
            found.append(torch.stack([flat[number * (len(flat) - 1) // 3].float() for number in range(4)]))
    return torch.cat(found).tolist() if found else []


def same_weights(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether two `some_weights` are of one model, which may have been rounded to 16 bits since."""
    return len(before) == len(now) and all(
        math.isclose(one, other, rel_tol=0.005, abs_tol=1e-7) for one, other in zip(before, now, strict=True))


def refuse_tensors(names: Iterable[str], allowed: Iterable[str], source: str | Path, what: str) -> None:
    """Raise CheckpointError "SOURCE: N tensors are WHAT: …" for those that no shell pattern of `allowed` covers."""
    bad = _outside(names, allowed)
    if bad:
        shown = ", ".join(map(repr, bad[:3])) + (" …" if len(bad) > 3 else "")
        raise CheckpointError(f"{source}: {len(bad)} tensors are {what}: {shown}.")


def refuse_diverged(model: nn.Module, origin: Mapping[str, str], otherwise: str | Path) -> None:
    """Refuse to export NaN of a diverged training: all codes would become 0, and every comparison would pass.

    `origin`: a tensor's name → the file that it came from, `otherwise` where that is not known.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{origin.get(name, otherwise)}: {name!r} holds numbers that are not finite, so its "
                                  "training has diverged; export an earlier checkpoint.")
