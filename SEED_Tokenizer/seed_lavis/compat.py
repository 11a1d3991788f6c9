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
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution
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


# Found by its metadata, since the folder `lavis` next to this package is first on the path.
try:
    _folder = Path(str(distribution("salesforce-lavis").locate_file("lavis")))
except PackageNotFoundError:
    raise SeedError(
        f"LAVIS (salesforce-lavis 1.0.2) is not installed; install it with {INSTALL_HINT}."
    ) from None
for _name in _BARE:
    _spec = ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(_folder.joinpath(*_name.split(".")[1:]))]
    sys.modules[_name] = module_from_spec(_spec)

# Stubs for packages that are not loaded yet, during LAVIS's own imports.
_stubbed = [name for name in _UNUSED if name.partition(".")[0] not in sys.modules]
sys.modules.update(dict.fromkeys(_stubbed, MagicMock()))
try:
    import lavis.common.optims  # noqa: F401  (registers the schedules)
    from lavis.common.config import Config  # noqa: F401
    from lavis.common.registry import registry
    from lavis.models.base_model import BaseModel
    from lavis.processors.base_processor import BaseProcessor
    from lavis.tasks.base_task import BaseTask

    registry.register_path("library_root", str(_folder))
    # `registry.register_model` and the others import base classes from the packages.
    for _base in (BaseModel, BaseProcessor, BaseTask):
        _package = sys.modules[_base.__module__.rpartition(".")[0]]
        setattr(_package, _base.__name__, _base)

    from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder  # noqa: F401
    from lavis.runners.runner_base import RunnerBase  # noqa: F401
    from lavis.tasks.image_text_pretrain import ImageTextPretrainTask  # noqa: F401
finally:
    for _name in _stubbed:
        del sys.modules[_name]
