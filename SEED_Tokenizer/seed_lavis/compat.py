"""The only module that adapts salesforce-lavis 1.0.2 to today's transformers and to machines without CUDA.

Import LAVIS names from here, never from `lavis` directly:

* `import lavis` loads its whole model zoo, which needs an old transformers: six packages are put into `sys.modules`
  empty, with LAVIS's folders as their path, so that only the required submodules are imported;
* unused packages that the required modules import are replaced by stand-ins during LAVIS's import;
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


class _StandIn(ModuleType):
    """A module that is imported and never used; its attributes are stand-ins, too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """`decord.bridge.set_bridge` is called when LAVIS is imported."""


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand-ins for packages that are not loaded yet, for the time of LAVIS's own imports."""
    placed = [name for name in _UNUSED if name.partition(".")[0] not in sys.modules]
    for name in placed:
        sys.modules[name] = module = _StandIn(name)
        module.__path__ = []  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in placed:
            sys.modules.pop(name, None)


def _bare_packages(folder: Path) -> None:
    for name in _BARE:
        place = str(folder.joinpath(*name.split(".")[1:]))
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [place]  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__spec__.submodule_search_locations = [place]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _import_parts(folder: Path) -> None:
    """Import the parts of LAVIS that are used, and register what its `__init__` would have registered."""
    from lavis.common.registry import registry

    for name, path in (
        ("library_root", folder),
        ("repo_root", folder.parent),
        ("cache_root", Path.home() / ".cache" / "lavis"),
    ):
        registry.register_path(name, str(path))
    registry.register("MAX_INT", sys.maxsize)
    registry.register("SPLIT_NAMES", ["train", "val", "test"])

    import lavis.common.optims  # noqa: F401  (registers the schedules)
    from lavis.models.base_model import BaseModel
    from lavis.processors.base_processor import BaseProcessor
    from lavis.tasks.base_task import BaseTask

    # `registry.register_model` and the others look for the base classes in the packages.
    for kind in (BaseModel, BaseProcessor, BaseTask):
        setattr(sys.modules[kind.__module__.rpartition(".")[0]], kind.__name__, kind)
    import lavis.datasets.builders.base_dataset_builder
    import lavis.runners.runner_base
    import lavis.tasks.image_text_pretrain  # noqa: F401


# The installed package: not the folder `lavis` next to this package, which is first on the path of programs here.
_here = Path(__file__).resolve().parents[1]
_elsewhere = [place for place in sys.path if Path(place or ".").resolve() != _here]
_spec = None if sys.modules.get("lavis", "") is None else PathFinder.find_spec("lavis", _elsewhere)
if _spec is None or _spec.origin is None:
    raise LavisMissing(
        f"LAVIS (salesforce-lavis 1.0.2) is not installed; install it with {INSTALL_HINT}."
    )
import torch.distributed  # noqa: E402, F401
import webdataset  # noqa: E402, F401  (both before the stand-ins, which other packages must not meet)

_bare_packages(Path(_spec.origin).parent)
with _stand_ins():
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
