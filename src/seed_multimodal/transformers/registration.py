"""Registers the families' classes with transformers' Auto classes as soon as those are imported.

`import seed_multimodal` does not import transformers. A finder waits for the three modules below,
and registers when one of them was executed; those that are imported already are registered at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

# Modules of transformers, and those of this package with the classes that are registered there.
AUTO_MODULES = {
    "transformers.models.auto.configuration_auto": "configuration",
    "transformers.models.auto.modeling_auto": "modeling",
    "transformers.models.auto.processing_auto": "processing",
}


class _RegisteringLoader(SourceFileLoader):
    """Executes one of `AUTO_MODULES`, then registers."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)


class _AutoModules(MetaPathFinder):
    """Finds `AUTO_MODULES` for `_RegisteringLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AUTO_MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None:
            return spec
        loader = _RegisteringLoader(fullname, spec.origin)
        return spec_from_file_location(fullname, spec.origin, loader=loader)


def _register(module: ModuleType) -> None:
    """Register the classes of all families in one of `AUTO_MODULES`."""
    from seed_multimodal.models.registry import families

    classes = importlib.import_module(f"{__package__}.{AUTO_MODULES[module.__name__]}")
    for spec in families():
        classes.register(spec.name, module)
    # A package that imports this one while its own family is not made yet was left out.
    families.cache_clear()


def install() -> None:
    """Register now what transformers has imported already, and the rest when it is imported."""
    sys.meta_path.insert(0, _AutoModules())
    for name in AUTO_MODULES:
        if name in sys.modules:
            _register(sys.modules[name])
