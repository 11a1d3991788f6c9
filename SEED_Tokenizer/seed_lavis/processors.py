"""The processors of the training YAMLs, under LAVIS's names, over the library's transforms; stage 1's word pieces.

`blip2_image_train` (random crop, flip, CLIP normalisation), `blip_image_eval` (resize, normalise), `blip_caption`.
The training view draws from the generator it is given, so that a sample's view is a function of (seed, epoch, index).
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
from seed_multimodal.seed.captions import BertWords, BlipCaption, PieceWords, open_words
from seed_multimodal.settings import check_keys


class Processor(BaseProcessor):
    """`make`: the library's transform, whose arguments are the keys of the processor's section."""

    make: Any

    def __init__(self, **keys: Any) -> None:
        self.transform = type(self).make(**keys)

    @classmethod
    def from_config(cls, cfg: DictConfig | None = None) -> Processor:
        """Built from its section; an unknown key is a `ConfigError`."""
        keys = dict(OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg or {})
        name = keys.pop("name", cls.__name__)
        check_keys(map(str, keys), inspect.signature(cls.make).parameters, f"processor {name}")
        return cls(**keys)

    def read(self, source: ImageSource, *, name: str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A stored image → uint8 `[3, S, S]`, what the data workers hand over."""
        return self.transform.read(source, name=name, generator=generator)

    def __call__(self, item: Image.Image | str, generator: torch.Generator | None = None) -> Any:
        """An image → float32 `[3, S, S]`; a caption → a caption."""
        return self.transform(item) if generator is None else self.transform(item, generator)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrain(Processor):
    """A random view of an image."""

    make = TrainTransform


@registry.register_processor("blip_image_eval")
class BlipImageEval(Processor):
    """The whole image, the same every time."""

    make = staticmethod(lambda image_size=224: seed_image_processor(image_size))


@registry.register_processor("blip_caption")
class BlipCaptionText(Processor):
    """A caption in lower case, without punctuation, cut to `max_words` (50), after `prompt`."""

    make = BlipCaption


def caption_words(source: str, max_length: int) -> BertWords | PieceWords:
    """The tokenizer in a folder, also one in `pretrained/`, or of a hub id, for captions padded to `max_length`.

    Raises:
        CheckpointError: nothing there; the sentence names what to put where.
    """
    place, beside = locate(source), locate(f"pretrained/{source}")
    return open_words(beside if not Path(place).exists() and Path(beside).is_dir() else place, max_length)
