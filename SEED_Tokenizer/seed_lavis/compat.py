"""Adapts salesforce-lavis 1.0.2 to today's transformers and to machines without CUDA.

Import LAVIS names from here, never from `lavis` directly:

* `import lavis` loads its model zoo, which needs an old transformers: six packages are put into
  `sys.modules` empty, with LAVIS's folders as their path, so that only the required submodules are
  imported;
* unused packages that the required modules import are replaced by stubs during LAVIS's import;
* `registry` needs paths and constants that `lavis/__init__` registers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from seed_multimodal.errors import SeedError

INSTALL_HINT = "sh SEED_Tokenizer/install.sh (or: bash install.sh --lavis)"
_BARE = (
    "lavis",
    "lavis.models",
    "lavis.processors",
    "lavis.tasks",
    "lavis.datasets",
    "lavis.datasets.builders",
)
_UNUSED = (
    "timm",
    "timm.models",
    "timm.models.hub",
    "torchvision",
    "torchvision.datasets",
    "torchvision.datasets.utils",
    "decord",
    "decord.bridge",
    "iopath",
    "iopath.common",
    "iopath.common.download",
    "iopath.common.file_io",
    "pandas",
)


class LavisMissing(SeedError):
    """salesforce-lavis is not installed."""


class _Stub(ModuleType):
    """A module that is imported and never used; its attributes are stubs, too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stub(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """`decord.bridge.set_bridge` is called when LAVIS is imported."""


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    """Stubs for packages that are not loaded yet, during LAVIS's own imports."""
    missing = [name for name in _UNUSED if name.partition(".")[0] not in sys.modules]
    for name in missing:
        stub = _Stub(name)
        stub.__path__ = []
        sys.modules[name] = stub
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def _bare_packages(folder: Path) -> None:
    """Put empty packages into `sys.modules` that find their submodules in LAVIS's folder."""
    for name in _BARE:
        path = str(folder.joinpath(*name.split(".")[1:]))
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [path]
        module = ModuleType(name)
        module.__path__ = [path]
        module.__spec__ = spec
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _import_parts(folder: Path) -> None:
    """Import the parts of LAVIS that are used, and register what its `__init__` registers."""
    # 1. Paths and constants.
    from lavis.common.registry import registry

    registry.register_path("library_root", str(folder))
    registry.register_path("repo_root", str(folder.parent))
    registry.register_path("cache_root", str(Path.home() / ".cache" / "lavis"))
    registry.register("MAX_INT", sys.maxsize)
    registry.register("SPLIT_NAMES", ["train", "val", "test"])

    import lavis.common.optims  # noqa: F401  (registers the schedules)
    from lavis.models.base_model import BaseModel
    from lavis.processors.base_processor import BaseProcessor
    from lavis.tasks.base_task import BaseTask

    # 2. Base classes, which `registry.register_model` and the others import from the packages.
    for base_class in (BaseModel, BaseProcessor, BaseTask):
        package = sys.modules[base_class.__module__.rpartition(".")[0]]
        setattr(package, base_class.__name__, base_class)

    # 3. Builders, runner and tasks, which import the base classes.
    import lavis.datasets.builders.base_dataset_builder
    import lavis.runners.runner_base
    import lavis.tasks.image_text_pretrain  # noqa: F401


# The installed package: not the folder `lavis` next to this package, which is first on the path of
# SEED_Tokenizer's programs.
_application = Path(__file__).resolve().parents[1]
_search_path = [path for path in sys.path if Path(path or ".").resolve() != _application]
_spec = None
if sys.modules.get("lavis", "") is not None:  # None: the import of LAVIS is blocked
    _spec = PathFinder.find_spec("lavis", _search_path)
if _spec is None or _spec.origin is None:
    raise LavisMissing(
        f"LAVIS (salesforce-lavis 1.0.2) is not installed; install it with {INSTALL_HINT}."
    )
import torch.distributed  # noqa: E402, F401
import webdataset  # noqa: E402, F401  (both before the stubs, which other packages must not import)

_bare_packages(Path(_spec.origin).parent)
with _stubs():
    _import_parts(Path(_spec.origin).parent)

from lavis.common.config import Config  # noqa: E402
from lavis.common.registry import registry  # noqa: E402
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder  # noqa: E402
from lavis.models.base_model import BaseModel  # noqa: E402
from lavis.processors.base_processor import BaseProcessor  # noqa: E402
from lavis.runners.runner_base import RunnerBase  # noqa: E402
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask  # noqa: E402

__all__ = [
    "BaseDatasetBuilder",
    "BaseModel",
    "BaseProcessor",
    "Config",
    "ImageTextPretrainTask",
    "LavisMissing",
    "RunnerBase",
    "registry",
]
