"""Lets a torchvision built for another torch be imported, without its C++ operators.

A CPU build of torch beside the package index's torchvision (a CUDA build) fails on import with
`operator torchvision::nms does not exist`, and takes transformers and diffusers down with it. Nothing in this project
uses torchvision's C++ operators, so it is enough that their two schemas exist before torchvision is imported.

Note: `install()` imports nothing; it acts when torchvision is first imported. Where torchvision's own library loads,
nothing is defined. Calling an operator that is only a schema fails with torchvision's own explanation.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# Schemas as torchvision's C++ library registers them; its Python side adds meta kernels to both on import.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_keep_alive: list[Any] = []  # a torch.library.Library takes its definitions with it when it is collected


class _BeforeTorchvision(MetaPathFinder):
    """Runs `ensure()` once, right before the first import of torchvision, then leaves the import to Python."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            uninstall()
            ensure()
        return None


def install() -> None:
    """Arrange for `ensure()` to run when torchvision is first imported; costs nothing until then."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def uninstall() -> None:
    """Undo `install()`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _BeforeTorchvision)]


def ensure() -> bool:
    """Define the operator schemas if torchvision is present but its own library cannot be loaded.

    Returns:
        True if schemas had to be defined (now or by an earlier call).
    """
    if _keep_alive:
        return True
    if "torchvision" in sys.modules:
        return False
    libraries = _operator_libraries()
    if libraries is None or any(_loads(library) for library in libraries):
        return False
    import torch

    definitions = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            definitions.define(schema)
    _keep_alive.append(definitions)
    return True


def _operator_libraries() -> list[Path] | None:
    """The compiled operator files of the installed torchvision; None where torchvision is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(file for pattern in ("_C*.so", "_C*.pyd", "_C*.dylib") for file in folder.glob(pattern))


def _loads(library: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(library))
    except (ImportError, OSError):
        return False
    return True
