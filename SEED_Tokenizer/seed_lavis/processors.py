"""The processors of the training YAMLs, by LAVIS's names.

blip2_image_train   random crop, flip, CLIP normalisation
blip_image_eval     resize, normalise
blip_caption        text clean-up
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_lavis.compat import BaseProcessor, registry
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.captions import BlipCaption
from seed_multimodal.settings import check_keys


class Processor(BaseProcessor):
    """Builds one of the library's transforms from the keys of the YAML's section."""

    make: Callable[..., Any]

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """The transform; an unknown key is a `ConfigError`."""
        keys: Any = OmegaConf.to_container(cfg, resolve=True)
        name = keys.pop("name")
        check_keys(keys, inspect.signature(cls.make).parameters, f"processor {name}")
        return cls.make(**keys)


@registry.register_processor("blip2_image_train")
class TrainImageProcessor(Processor):
    make = TrainTransform


@registry.register_processor("blip_image_eval")
class EvalImageProcessor(Processor):
    make = staticmethod(seed_image_processor)


@registry.register_processor("blip_caption")
class CaptionProcessor(Processor):
    make = BlipCaption
