"""Systems that models and processors of a folder share."""

from __future__ import annotations

import os
import weakref

from seed_multimodal.inference.engines import NO_ENGINE, TORCH
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig

# The system that was loaded last from a folder, while its model is in use.
_loaded: weakref.WeakValueDictionary[str, MultimodalSystem] = weakref.WeakValueDictionary()


def remember(folder: str, system: MultimodalSystem) -> None:
    """Let processors of `folder` use the system of a model."""
    _loaded[os.path.realpath(folder)] = system


def open_system(folder: str) -> MultimodalSystem:
    """The system of a model of `folder`, or a new one.

    A new one has a language model only if that is needed to embed images.
    """
    system = _loaded.get(os.path.realpath(folder))
    if system is not None:
        return system
    config = SystemConfig.find(folder)
    engine = NO_ENGINE if config.abilities.reads_codes else TORCH
    return MultimodalSystem.from_pretrained(config, log=None, engine=engine)
