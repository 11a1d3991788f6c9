"""Configurations: `config.json` next to `system.json`, which has all settings."""

from __future__ import annotations

from transformers import PreTrainedConfig


class SeedMultimodalConfig(PreTrainedConfig):
    """Configuration of a family's model; its folder's `system.json` has the settings.

    text_config: of the language model, set when that is loaded.
    """
