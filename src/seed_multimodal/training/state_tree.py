"""Nested states (an optimiser's, for example) as one safetensors file: tensors by number, all else as JSON beside them.

No pickle: the JSON is in the file's own metadata, so a state is one file that holds data only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import set_default_mode
from seed_multimodal.errors import CheckpointError

_TENSOR, _NUMBERED, _TUPLE = "__tensor__", "__numbered__", "__tuple__"


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A JSON-able tree that refers to tensors by name, and those tensors, copied to the CPU."""
    tensors: dict[str, Tensor] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        if isinstance(node, dict):
            if all(isinstance(key, str) for key in node):
                return {key: visit(item) for key, item in node.items()}
            return {_NUMBERED: [[key, visit(item)] for key, item in node.items()]}
        if isinstance(node, tuple):
            return {_TUPLE: [visit(item) for item in node]}
        if isinstance(node, list):
            return [visit(item) for item in node]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"a {type(node).__name__} cannot be kept in a state")

    return visit(value), tensors


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `flatten`."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _NUMBERED in tree:
        return {key: unflatten(item, tensors) for key, item in tree[_NUMBERED]}
    if _TUPLE in tree:
        return tuple(unflatten(item, tensors) for item in tree[_TUPLE])
    return {key: unflatten(item, tensors) for key, item in tree.items()}


def write_tree(file: Path, tree: Any, tensors: dict[str, Tensor]) -> None:
    """Write what `flatten` gave. Errors of the disk are raised as they are."""
    from safetensors.torch import save_file

    save_file(tensors or {"none": torch.zeros(0)}, file, metadata={"format": "pt", "tree": json.dumps(tree)})
    set_default_mode(file)


def read_tree(file: Path) -> Any:
    """The nested state of a file.

    Raises:
        CheckpointError: it is missing, damaged or no such state.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tree = json.loads((opened.metadata() or {})["tree"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return unflatten(tree, tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: is no readable state of a training run ({error}).") from error
