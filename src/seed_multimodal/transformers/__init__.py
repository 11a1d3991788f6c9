"""The families as models of transformers: configuration, model and processor of each.

`import seed_multimodal` registers them with `AutoConfig`, `AutoModelForMultimodalLM` and
`AutoProcessor` (see `registration`). They are thin: a `MultimodalSystem` encodes images, builds
prompts and draws.

    import seed_multimodal
    from transformers import pipeline

    pipe = pipeline("any-to-any", model="pretrained/nano")

The classes are named after the family's system: `SeedLlamaConfig`,
`SeedLlamaForConditionalGeneration`, `SeedLlamaProcessor`, also `SeedX…` and `Lavit…`.
"""

from __future__ import annotations

import importlib

# Ends of the names of a family's classes, and the modules that make them.
KINDS = {
    "Config": "configuration",
    "ForConditionalGeneration": "modeling",
    "Processor": "processing",
}


def __getattr__(name: str) -> type:
    """The class of a family by its name, as `SeedLlamaConfig`."""
    for suffix, module_name in KINDS.items():
        if name.endswith(suffix):
            return _class_of(name.removesuffix(suffix), module_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _class_of(system_name: str, module_name: str) -> type:
    """A class of the family with this system. Raises AttributeError: none."""
    from seed_multimodal.models.registry import families

    for spec in families():
        if spec.system_name == system_name:
            module = importlib.import_module(f"{__name__}.{module_name}")
            family_class: type = module.class_of(spec.name)
            return family_class
    raise AttributeError(f"no family has the system {system_name!r}")
