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

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from seed_lavis.compat import BaseProcessor, registry
from seed_lavis.options import locate
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.io import ImageSource
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.captions import (
    BertCaptionTokenizer,
    BlipCaption,
    MultimodalCaptionTokenizer,
    load_caption_tokenizer,
)
from seed_multimodal.settings import check_keys


class Processor(BaseProcessor):
    """One of the library's transforms; `make` builds it from the keys of the YAML's section."""

    make: Callable[..., Any]

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Processor:
        """Built from its section; an unknown key is a `ConfigError`."""
        keys: Any = OmegaConf.to_container(cfg, resolve=True)
        name = keys.pop("name")
        check_keys(keys, inspect.signature(cls.make).parameters, f"processor {name}")
        return Processor(cls.make(**keys))

    def read(
        self,
        source: ImageSource,
        *,
        name: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A stored image → uint8 `[3, S, S]`, for the data workers.

        generator: samples the view.
        """
        return self.transform.read(source, name=name, generator=generator)

    def __call__(self, item: Image.Image | str, generator: torch.Generator | None = None) -> Any:
        """An image → float32 `[3, S, S]`; a caption → a caption."""
        if generator is None:
            return self.transform(item)
        return self.transform(item, generator)


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
