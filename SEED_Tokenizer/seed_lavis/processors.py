"""The processors of the training YAMLs, under LAVIS's names, over the library's transforms; stage 1's word pieces.

`blip2_image_train` (random crop, flip, CLIP normalisation), `blip_image_eval` (resize, normalise), `blip_caption`.
"""

from __future__ import annotations

import inspect
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
from seed_multimodal.seed.captions import (
    BertCaptionTokenizer,
    BlipCaption,
    MultimodalCaptionTokenizer,
    load_caption_tokenizer,
)
from seed_multimodal.settings import check_keys


class Processor(BaseProcessor):
    """One of the library's transforms; `make` is called with the keys of the processor's section."""

    make: Any

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
        """A stored image → uint8 `[3, S, S]`, what the data workers hand over; views are drawn with `generator`."""
        return self.transform.read(source, name=name, generator=generator)

    def __call__(self, item: Image.Image | str, generator: torch.Generator | None = None) -> Any:
        """An image → float32 `[3, S, S]`; a caption → a caption."""
        return self.transform(item) if generator is None else self.transform(item, generator)


for _name, _make in (
    ("blip2_image_train", TrainTransform),
    ("blip_caption", BlipCaption),
    ("blip_image_eval", staticmethod(lambda image_size=224: seed_image_processor(image_size))),
):
    registry.register_processor(_name)(type(_name, (Processor,), {"make": _make}))


def caption_words(
    source: str, max_length: int
) -> BertCaptionTokenizer | MultimodalCaptionTokenizer:
    """The tokenizer of a folder, also one in `pretrained/`, or of a hub id, for captions padded to `max_length`."""
    place, below = locate(source), locate(f"pretrained/{source}")
    return load_caption_tokenizer(
        below if not Path(place).exists() and Path(below).is_dir() else place, max_length
    )
