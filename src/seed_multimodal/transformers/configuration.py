"""Configurations: `config.json` next to `system.json`, which has all settings."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from transformers import PreTrainedConfig

from seed_multimodal.models.registry import find_family


class SeedMultimodalConfig(PreTrainedConfig):
    """Configuration of a family's model; its folder's `system.json` has the settings.

    text_config: of the language model, set when that is loaded.
    """


@cache
def class_of(family: str) -> type[SeedMultimodalConfig]:
    """The configuration of a family, as `SeedLlamaConfig`."""
    spec = find_family(family)
    return type(
        f"{spec.system_name}Config",
        (SeedMultimodalConfig,),
        {"__module__": __package__, "__doc__": f"Of {spec.title}.", "model_type": family},
    )


def register(family: str, auto: ModuleType) -> None:
    """Register a family in transformers' module of `AutoConfig`."""
    auto.AutoConfig.register(family, class_of(family), exist_ok=True)
