"""Registers the families' classes with transformers' Auto classes as soon as those are imported.

`import seed_multimodal` does not import transformers. A finder waits for the three modules below,
and registers when one of them was executed; those that are imported already are registered at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

from seed_multimodal.errors import SeedWarning

# Modules of transformers, their Auto classes, and the kind of class that is registered there.
AUTO_MODULES = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", "Config"),
    "transformers.models.auto.modeling_auto": (
        "AutoModelForMultimodalLM",
        "ForConditionalGeneration",
    ),
    "transformers.models.auto.processing_auto": ("AutoProcessor", "Processor"),
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
    """Register the classes of all families in one of `AUTO_MODULES`; a family with the name of a
    model of transformers would take that model's place, and is left out with a warning."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from seed_multimodal.models.registry import families
    from seed_multimodal.transformers import class_of

    auto_class, kind = AUTO_MODULES[module.__name__]
    for spec in families():
        if spec.name in CONFIG_MAPPING_NAMES:
            warnings.warn(
                f"The family {spec.name} has the name of a model of transformers, so transformers' "
                "classes do not load its systems: choose another name.",
                SeedWarning,
                stacklevel=2,
            )
            continue
        key = spec.name if kind == "Config" else class_of(spec.name, "Config")
        getattr(module, auto_class).register(key, class_of(spec.name, kind), exist_ok=True)
    # A package that imports this one while its own family is not made yet was left out.
    families.cache_clear()


def install() -> None:
    """Register now what transformers has imported already, and the rest when it is imported."""
    sys.meta_path.insert(0, _AutoModules())
    for name in AUTO_MODULES:
        if name in sys.modules:
            _register(sys.modules[name])
