"""Adapts salesforce-lavis 1.0.2 to today's transformers and to machines without CUDA.

Import LAVIS names from here, never from `lavis` directly:

* `import lavis` loads its model zoo, which needs an old transformers: six packages are put into
  `sys.modules` empty, with LAVIS's folders as their path, so that only the required submodules are
  imported;
* unused packages that the required modules import are replaced by stubs during LAVIS's import;
* `registry` needs paths that `lavis/__init__` registers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch.distributed  # noqa: F401
import webdataset  # noqa: F401  (both before the stubs, which other packages must not import)

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


@contextmanager
def _stubs() -> Iterator[None]:
    """Stubs for packages that are not loaded yet, during LAVIS's own imports."""
    missing = [name for name in _UNUSED if name.partition(".")[0] not in sys.modules]
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _find_lavis() -> Path:
    """The installed package, not the folder `lavis` next to this package, which is first on the
    path of SEED_Tokenizer's programs."""
    application = Path(__file__).resolve().parents[1]
    search_path = [path for path in sys.path if Path(path or ".").resolve() != application]
    is_blocked = sys.modules.get("lavis", "") is None
    spec = None if is_blocked else PathFinder.find_spec("lavis", search_path)
    if spec is None or spec.origin is None:
        raise LavisMissing(
            f"LAVIS (salesforce-lavis 1.0.2) is not installed; install it with {INSTALL_HINT}."
        )
    return Path(spec.origin).parent


_folder = _find_lavis()
for _name in _BARE:
    _spec = ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(_folder.joinpath(*_name.split(".")[1:]))]
    sys.modules[_name] = module_from_spec(_spec)

with _stubs():
    import lavis.common.optims  # noqa: F401  (registers the schedules)
    from lavis.common.config import Config
    from lavis.common.registry import registry
    from lavis.models.base_model import BaseModel
    from lavis.processors.base_processor import BaseProcessor
    from lavis.tasks.base_task import BaseTask

    registry.register_path("library_root", str(_folder))
    registry.register_path("cache_root", str(Path.home() / ".cache" / "lavis"))
    # `registry.register_model` and the others import base classes from the packages.
    for _base in (BaseModel, BaseProcessor, BaseTask):
        _package = sys.modules[_base.__module__.rpartition(".")[0]]
        setattr(_package, _base.__name__, _base)

    from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
    from lavis.runners.runner_base import RunnerBase
    from lavis.tasks.image_text_pretrain import ImageTextPretrainTask

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
