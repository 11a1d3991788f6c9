"""Reading and writing weights: safetensors, or torch files through `torch_files`.

All state dicts are loaded by `assign_strictly`. Missing tensors or other shapes raise an error;
unknown tensors raise an error in our own files and are ignored with a warning in `foreign` ones.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seed_multimodal.disk import atomic_path, read_json_object
from seed_multimodal.errors import CheckpointError, SeedWarning, first_line, name_content, pluralize
from seed_multimodal.torch_files import read_torch_content, read_torch_file

# Names in a model's folder, in order of preference: the index of several files, and a single one.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_LISTED_NAMES = 5  # tensors that a message names


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
            f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.missing)} not in the "
            f"file, {len(self.ignored)} in the file ignored."
        )


def _listed(names: Sequence[str]) -> str:
    ending = " …" if len(names) > _LISTED_NAMES else ""
    return ", ".join(map(repr, names[:_LISTED_NAMES])) + ending


def load_state_dict(
    path: str | Path, *, mapped: bool = False, placeholders: bool = False
) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors`, `.pt`, `.pth` or `.bin` file, on the CPU; wrappers like
    `{"model": …}` are removed.

    mapped: memory-mapped: the file must not be overwritten in place (safetensors always are).
    placeholders: ignore objects of unknown classes in a torch file, which otherwise are an error.

    Raises CheckpointError: missing, truncated or unsafe file, or one without tensors.
    """
    file = Path(path)
    if not os.path.isfile(file):  # Path.is_file raises for a name too long
        raise CheckpointError(f"{file}: no such weights file.")
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises errors of many types for wrong bytes
            raise CheckpointError(
                f"{file}: not a complete weights file ({name_content(file) or first_line(error)})."
            ) from error
    else:
        tensors = read_torch_file(file, mapped, placeholders)
    if not tensors:
        raise CheckpointError(f"{path}: contains no tensors.")
    return tensors


def load_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder with one or several. Raises CheckpointError:
    none."""
    # The file itself, or a folder's single file, else all its shards.
    folder = Path(source)
    for file in (folder, *(folder / name for name in SINGLE_FILES)):
        if file.is_file():
            return load_state_dict(file, mapped=True)
    tensors: dict[str, Tensor] = {}
    for file in [*folder.glob("*.safetensors")] or folder.glob("*pytorch_model*.bin"):
        tensors |= load_state_dict(file, mapped=True)
    if not tensors:
        raise CheckpointError(f"{source}: no weights (*.safetensors or *.bin).")
    return tensors


def tensors_below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a part of a model, by its own names."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def missing_weights(folder: Path, name: str = "model.safetensors") -> Path | None:
    """The first file that a model's folder lacks: `config.json`, a shard that an index lists, or
    any weights (then `name`)."""
    if not (folder / "config.json").is_file():
        return folder / "config.json"
    # Weights in several files: their index names them all.
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(read_json_object(index).get("weight_map", {}).values()))
        return next((folder / shard for shard in shards if not (folder / shard).is_file()), None)
    if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        return None
    return folder / name


def read_training_state(file: Path) -> Mapping[str, object]:
    """The mapping in a torch file that a training saved to be resumed. Raises CheckpointError."""
    content = read_torch_content(file)
    return content if isinstance(content, Mapping) else {}


def save_state_dict(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write safetensors atomically. Raises OSError: disk error; the old file stays."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)

    # safetensors refuses tensors that share their storage, such as tied weights.
    content: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        content[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)

    with atomic_path(file) as temporary:
        try:
            save_file(content, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(errno.EIO, first_line(error)) from error
        # safetensors creates files that only their owner can read.
        mask = os.umask(0o022)  # reading the mask requires setting it
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
    return file


def save_torch(content: object, path: str | Path) -> None:
    """Atomic `torch.save`. Raises OSError: disk error."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
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
    """Load `state` into `module`, accounting for every name. A module on the meta device gets the
    tensors themselves, moved to `device` in its precision; otherwise they are copied.

    source: the file in messages.
    allow_missing, allow_unexpected: shell patterns of names.
    foreign: the file is not ours: unexpected names are a warning.

    Raises CheckpointError: nothing matches, a shape differs, integers for floats, or a name that is
    not allowed is missing or unexpected.
    """
    # 1. Which names match?
    expected = module.state_dict()
    report = LoadReport(
        source=str(source),
        loaded=[name for name in expected if name in state],
        missing=[name for name in expected if name not in state],
        ignored=[name for name in state if name not in expected],
    )
    if not report.loaded:
        raise CheckpointError(
            f"{source}: a checkpoint of another model: none of its {len(state)} tensors "
            f"(first: {next(iter(state), 'none')!r}) belongs to {type(module).__name__}."
        )

    # 2. Errors, before anything is changed.
    _check_values(expected, state, source)
    refuse_tensors(report.missing, allow_missing, source, "missing from the file")
    if foreign:
        warn_tensors(report.ignored, allow_unexpected, source)
    else:
        refuse_tensors(report.ignored, allow_unexpected, source, "unknown to the model")

    # 3. Parameters without memory get the tensors, others their values.
    assigned: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}
    for name in report.loaded:
        if expected[name].is_meta:
            assigned[name] = state[name].to(device, expected[name].dtype).contiguous()
        else:
            copied[name] = state[name]
    module.load_state_dict(assigned, strict=False, assign=True)
    module.load_state_dict(copied, strict=False)
    return report


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    """Copy tensors by name.

    Raises CheckpointError: missing or unknown tensors, or of another size or kind.
    """
    refuse_tensors(sorted(weights.keys() - state), (), label, "missing from the file")
    refuse_tensors(sorted(state.keys() - weights), (), label, "unknown to the model")
    _check_values(weights, state, label)
    # Copied into the trained parameters, which may be in another precision than the file.
    for name, value in weights.items():
        value.copy_(state[name])


def _check_values(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path
) -> None:
    """Raise CheckpointError for tensors of another size than the model's, or integers for
    floats."""
    resized = [
        name for name in expected if name in state and expected[name].shape != state[name].shape
    ]
    if resized:
        name = resized[0]
        raise CheckpointError(
            f"{source}: {len(resized)} tensors have another size, first {name!r}: the file has "
            f"{tuple(state[name].shape)}, the model needs {tuple(expected[name].shape)}."
        )
    floats = (name for name in expected if name in state and expected[name].is_floating_point())
    refuse_integers([name for name in floats if not state[name].is_floating_point()], source)


def integer_weights(folder: Path) -> list[str]:
    """Names of integer weights in a model's safetensors."""
    names: list[str] = []
    for file in (*folder.glob("model.safetensors"), *folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weights = [name for name in tensors.keys() if name.endswith("weight")]
            names += [name for name in weights if tensors.get_slice(name).get_dtype()[0] in "IU"]
    return names


def refuse_integers(names: Sequence[str], source: str | Path) -> None:
    """Raise CheckpointError for integers that a model would read as floats."""
    refuse_tensors(names, (), source, "integers, as of a quantized model, where floats belong")


def _outside(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that match no shell pattern."""
    patterns = [*patterns]
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]


def warn_tensors(names: Iterable[str], allowed: Iterable[str], source: str | Path) -> None:
    """Warn about unused tensors in a file that match no shell pattern of `allowed`."""
    unlisted = _outside(names, allowed)
    if unlisted:
        warnings.warn(
            f"{source}: ignored {pluralize(len(unlisted), 'tensor')} unknown to the model: "
            f"{_listed(unlisted)}.",
            SeedWarning,
            stacklevel=3,
        )


def require_tensor(state: Mapping[str, Tensor], name: str, source: str | Path, what: str) -> None:
    """Raise CheckpointError "SOURCE: not WHAT: …" without a tensor that every such file has."""
    if name not in state:
        raise CheckpointError(
            f"{source}: not {what}: it holds no {name!r} (its first tensor is "
            f"{next(iter(state), 'none')!r})."
        )


def refuse_tensors(
    names: Iterable[str], allowed: Iterable[str], source: str | Path, what: str
) -> None:
    """Raise CheckpointError "SOURCE: N tensors are WHAT: …" for names that match no shell pattern
    of `allowed`."""
    refused = _outside(names, allowed)
    if refused:
        raise CheckpointError(f"{source}: {len(refused)} tensors are {what}: {_listed(refused)}.")
