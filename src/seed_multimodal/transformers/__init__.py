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
from functools import cache

# Ends of the names of a family's classes, and the module and class that they extend.
BASES = {
    "Config": ("configuration", "SeedMultimodalConfig"),
    "ForConditionalGeneration": ("modeling", "SeedMultimodalForConditionalGeneration"),
    "Processor": ("processing", "SeedMultimodalProcessor"),
}


def __getattr__(name: str) -> type:
    """The class of a family by its name, as `SeedLlamaConfig`."""
    # Python asks for its submodules here, too: the families are imported for their classes alone.
    for kind in BASES:
        if name.endswith(kind):
            from seed_multimodal.models.registry import families

            for spec in families():
                if name == f"{spec.system_name}{kind}":
                    return class_of(spec.name, kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def class_of(family: str, kind: str) -> type:
    """The class of a family that ends in `kind` (of `BASES`)."""
    from seed_multimodal.models.registry import find_family

    spec = find_family(family)
    module, base = BASES[kind]
    attributes: dict[str, object] = {"__module__": __name__, "__doc__": f"Of {spec.title}."}
    if kind == "Config":
        attributes["model_type"] = family
    else:
        attributes["config_class"] = class_of(family, "Config")
    bases = (getattr(importlib.import_module(f"{__name__}.{module}"), base),)
    return type(f"{spec.system_name}{kind}", bases, attributes)
