"""Tensors of a checkpoint read one at a time, and safetensors shards written one tensor at a time.

A 13B model is 52 GB in fp32: only one tensor is held in memory at a time. Old `.bin` shards are mapped, not read
(`torch.load(mmap=True, weights_only=True)`); only files of the format before torch 1.6 must be read whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, counted
from seed_multimodal.weights import load_state_dict

SINGLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and how large it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of a weights file, or of a folder with one or several; one file is open at a time.

    Raises:
        CheckpointError: no weights, a shard that is missing, damaged, or holds more than tensors.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self.entries: dict[str, TensorEntry] = {}
        self._file: Path | None = None
        self._handle: Any = None
        for file in weight_files(self.source):
            for name in self._open(file).keys():  # noqa: SIM118 (safetensors' handle is no mapping)
                self.entries[name] = TensorEntry(file, *self._kind(name))
        if not self.entries:
            raise CheckpointError(f"{self.source}: holds no tensors.")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; it may be a view of a mapped file."""
        entry = self.entries[name]
        if entry.file != self._file:
            self._open(entry.file)
        return self._handle.get_tensor(name) if entry.file.suffix == ".safetensors" else self._handle[name]

    def close(self) -> None:
        """Close the open file."""
        self._file = self._handle = None

    def _open(self, file: Path) -> Any:
        """The handle of a file, which takes the place of the one that was open."""
        self.close()
        self._handle = _open_safetensors(file) if file.suffix == ".safetensors" else (
            load_state_dict(file, mapped=True))
        self._file = file
        return self._handle

    def _kind(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if isinstance(self._handle, Mapping):
            return tuple(self._handle[name].shape), self._handle[name].dtype
        part = self._handle.get_slice(name)
        kind = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return tuple(part.get_shape()), kind.get(part.get_dtype(), torch.uint8)


def weight_files(source: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by its index if it has one.

    Raises:
        CheckpointError: none, or one that the index names is not there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such checkpoint.")
    index = next((source / name for name in INDEXES if (source / name).is_file()), None)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of shards.") from error
        files = [source / str(name) for name in names]
    else:
        files = [source / name for name in SINGLE if (source / name).is_file()][:1]
        files = files or sorted([*source.glob("*.safetensors"), *source.glob("pytorch_model*.bin")])
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this shard is missing, although {index} names it.")
    if not files:
        raise CheckpointError(f"{source}: there are no weights in it (*.safetensors or *.bin).")
    return files


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}).") from error


def write_shards(folder: Path, tensors: Mapping[str, Tensor], value: Callable[[str], Tensor], largest: int,
                 log: Callable[[str], None] | None = None) -> list[Path]:
    """Write `model.safetensors`, or `model-0000k-of-0000n.safetensors` with their index, cut as transformers cuts them.

    Args:
        tensors: name → a tensor on the meta device with the shape and precision to write.
        value: gives each tensor when it is written; only one is held at a time.
        largest: bytes of a file (a tensor larger than that is in one of its own).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=largest)
    for file, names in split.filename_to_tensors.items():
        _write_one(folder / file, {name: tensors[name] for name in names}, value)
        if log is not None:
            log(f"{file}: {counted(len(names), 'tensor')}")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]


def _write_one(file: Path, tensors: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """The safetensors format: length of the header, the header in json, the numbers of one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in tensors.items():
            tensor = value(name).to(wanted.dtype).contiguous()
            if tensor.shape != wanted.shape:
                raise CheckpointError(f"{name!r} became {tuple(tensor.shape)} instead of {tuple(wanted.shape)}.")
            if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name!r} holds numbers that fp16 cannot hold; choose bf16 or fp32.")
            handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        handle.flush()
        os.fsync(handle.fileno())


def parse_size(size: str | int) -> int:
    """`5GB`, `500MiB` or a number of bytes → bytes.

    Raises:
        ConfigError: neither, or less than one.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(size))
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        count = int(float(match[1]) * unit) if match is not None and unit is not None else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"max_shard_size {size!r} is not a size: write for example 5GB or 500MiB.")
    return count
