"""Torch files (`.pt`, `.pth`, `.bin`, `.ckpt`), read by torch's restricted unpickler: it builds
tensors and plain values, and calls no function of the file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from seed_multimodal.errors import CheckpointError, first_line, name_content

WRAPPERS = ("model", "state_dict", "module")  # keys under which files have their tensors, nested


class Placeholder:
    """In place of an object of an unknown class: accepts any arguments and state, does nothing."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_torch_content(file: Path, mapped: bool = False, placeholders: bool = False) -> Any:
    """What `torch.save` has written, on the CPU.

    mapped: memory-mapped: the file must not be overwritten in place. Changes of the tensors do not
    reach it. Files of torch before 1.6, which are no zip archives, are copied.
    placeholders: replace objects of unknown classes, an error otherwise (and not in a zip archive).

    Raises CheckpointError: missing, damaged or unsafe.
    """
    try:
        is_zip = zipfile.is_zipfile(file)
        # Such files hold the objects of a training program; all of them are zip archives.
        unknown_names = get_unsafe_globals_in_checkpoint(file) if placeholders and is_zip else []
        with safe_globals([(Placeholder, name) for name in unknown_names]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except Exception as error:  # torch's reader raises errors of many types for wrong bytes
        content = name_content(file)
        if isinstance(error, pickle.UnpicklingError) and not content:
            raise CheckpointError(
                f"{file}: rejected, because it has unsafe pickle content or is damaged; re-save it "
                "as safetensors from a source you trust."
            ) from error
        raise CheckpointError(
            f"{file}: not a complete weights file ({content or first_line(error)})."
        ) from error


def read_torch_file(
    file: Path, mapped: bool = False, placeholders: bool = False
) -> dict[str, Tensor]:
    """The tensors in a torch file; wrappers like `{"model": …}` are removed.

    Arguments and errors are those of `read_torch_content`.
    """
    content = read_torch_content(file, mapped, placeholders)
    if isinstance(content, Tensor):
        return {"": content}
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    # Other values are such as the step of a training's checkpoint.
    tensors: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    return tensors
