"""Weights in torch files (`.pt`, `.pth`, `.bin`, `.ckpt`), whose pickles this process never reads.

A child process (`torch_index`) reads the pickle and answers where the tensors lie; here their bytes
are mapped or copied from the file. Nothing is written, whatever the file's size and whether or not
its folder is writable.

On Linux (x86-64, Arm) the child has no network, can open, write and remove no file and start no
program; it has half a gigabyte of memory and a minute of processor time. On other systems time and
output are limited only. Everywhere the names in the pickle resolve to inert functions, and the
environment with its tokens stays here.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from seed_multimodal import torch_index
from seed_multimodal.errors import CheckpointError, first_line

TIMEOUT = 600.0  # seconds; a slow disk counts here, and not as the child's processor time
ALIGNMENT = 16  # of storages that are mapped; old files have them at any position
# A tensor in the child's answer: dtype, position and bytes of its storage in the file; offset, size
# and stride in it.
IndexEntry = tuple[str, int, int, int, list[int], list[int]]


def read_torch_file(
    file: Path, mapped: bool = False, placeholders: bool = False
) -> dict[str, Tensor]:
    """The tensors of a torch file, on the CPU; wrappers like `{"model": …}` are removed.

    mapped: memory-mapped: the file must not be overwritten in place. Changes of the tensors do not
    reach it.
    placeholders: ignore objects of unknown classes, which otherwise are an error.

    Raises CheckpointError: damaged or unsafe.
    """
    try:
        with open(file, "rb") as handle:
            answer = _index(handle, placeholders)
            if "unsafe" in answer:
                raise CheckpointError(
                    f"{file}: rejected, because it has unsafe pickle content ({answer['unsafe']}); "
                    f"re-save it as safetensors from a source you trust."
                )
            if "tensors" not in answer:
                raise ValueError(answer.get("damaged"))
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return _views(torch.frombuffer(content, dtype=torch.uint8), answer["tensors"], mapped)
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        OverflowError,
        subprocess.TimeoutExpired,
    ) as error:
        raise CheckpointError(
            f"{file}: not a complete weights file ({first_line(error)})."
        ) from error


def _index(handle: BinaryIO, placeholders: bool) -> dict[str, Any]:
    """The child's answer for an open file."""
    command = [sys.executable, "-I", "-S", torch_index.__file__]
    if placeholders:
        command.append("--placeholders")
    # A Python outside of the system's folders may need its libraries.
    environment = {}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with tempfile.TemporaryFile() as output:
        child = subprocess.run(
            command,
            stdin=handle,
            stdout=output,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=TIMEOUT,
        )
        if child.returncode:
            raise ValueError(f"its reader was stopped: {child.returncode}")
        output.seek(0)
        answer = json.loads(output.read())
    if not isinstance(answer, dict):
        raise ValueError("its reader gave no answer")
    return answer


def _views(content: Tensor, index: dict[str, IndexEntry], mapped: bool) -> dict[str, Tensor]:
    """Tensors by name in the mapped file, or in copies of it.

    Raises ValueError, TypeError: not inside the file.
    """
    whole = content.untyped_storage()
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    tensors = {}
    for name, entry in index.items():
        # 1. The child may have been taken over by the file: its answer is checked, too.
        dtype_name, position, nbytes, offset, size, stride = entry
        numbers = [position, nbytes, offset, *size, *stride]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"tensor {name!r} has no valid place")
        if dtype_name not in torch_index.ITEM_SIZES or len(size) != len(stride):
            raise ValueError(f"tensor {name!r} has no valid type")
        dtype = getattr(torch, dtype_name)
        n_elements = 0
        if math.prod(size):
            n_elements = offset + 1
            for length, step in zip(size, stride, strict=True):
                n_elements += (length - 1) * step
        if position + nbytes > len(content) or n_elements * dtype.itemsize > nbytes:
            raise ValueError(f"tensor {name!r} ends after the file")

        # 2. Tensors of one storage share it.
        place = (position, nbytes)
        if place not in storages:
            storage = whole[position : position + nbytes]
            is_view = mapped and position % ALIGNMENT == 0
            storages[place] = storage if is_view else storage.clone()
        tensors[name] = torch.empty(0, dtype=dtype).set_(storages[place], offset, size, stride)
    return tensors
