"""The processors of the training YAMLs, by LAVIS's names; the caption tokenizer of stage 1.

blip2_image_train   random crop, flip, CLIP normalisation
blip_image_eval     resize, normalise
blip_caption        text clean-up
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_lavis.compat import BaseProcessor, registry
from seed_lavis.options import locate
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.captions import (
    BertCaptionTokenizer,
    BlipCaption,
    MultimodalCaptionTokenizer,
    load_caption_tokenizer,
)
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


def caption_tokenizer(
    source: str, max_length: int
) -> BertCaptionTokenizer | MultimodalCaptionTokenizer:
    """The tokenizer of captions padded to `max_length`.

    source: a folder, also one in `pretrained/`, or a hub id.
    """
    path = locate(source)
    in_pretrained = locate(f"pretrained/{source}")
    if not Path(path).exists() and Path(in_pretrained).is_dir():
        path = in_pretrained
    return load_caption_tokenizer(path, max_length)
