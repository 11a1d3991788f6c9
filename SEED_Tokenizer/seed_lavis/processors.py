"""The processors of the training YAMLs, under LAVIS's names, over the library's transforms.

`blip2_image_train` (random crop, flip, CLIP normalisation), `blip_image_eval` (resize, normalise), `blip_caption`.
The training view draws from the generator it is given, so that a sample's view is a function of (seed, epoch, index).
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from seed_lavis.compat import BaseProcessor, registry
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.io import ImageSource
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.language.words import BlipCaption
from seed_multimodal.settings import check_keys


class Processor(BaseProcessor):
    """`keys`: what its section of the YAML may hold beside `name`; `where`: how errors name it."""

    keys: tuple[str, ...] = ()
    where = ""

    @classmethod
    def from_config(cls, cfg: DictConfig | None = None) -> Processor:
        """Built from its section; an unknown key is a `ConfigError`."""
        values = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg or {})
        assert isinstance(values, dict)
        check_keys(map(str, values), ("name", *cls.keys), cls.where)
        return cls(**{str(key): value for key, value in values.items() if key != "name"})


class ImageProcessor(Processor):
    """`transform`: one of the library's."""

    transform: TrainTransform | ImageTransform

    def read(self, source: ImageSource, *, name: str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A stored picture → uint8 `[3, S, S]`, what the data workers hand over."""
        return self.transform.read(source, name=name, generator=generator)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrain(ImageProcessor):
    """A picture → a random view, float32 `[3, S, S]`; keys as of `TrainTransform`."""

    keys, where = ("image_size", "min_scale", "max_scale", "scaled_decoding"), "vis_processor blip2_image_train"

    def __init__(self, **sizes: Any) -> None:
        self.transform = TrainTransform(**sizes)  # not LAVIS's own start, a lambda: data workers may be pickled

    def __call__(self, item: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return self.transform(item, generator)


@registry.register_processor("blip_image_eval")
class BlipImageEval(ImageProcessor):
    """A picture → float32 `[3, S, S]`, the same every time."""

    keys, where = ("image_size",), "vis_processor blip_image_eval"

    def __init__(self, image_size: int = 224) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"image_size must be a positive number of pixels, not {image_size!r}.")
        self.transform = seed_image_processor(image_size)


@registry.register_processor("blip_caption")
class BlipCaptionText(Processor):
    """A caption → lower case, without punctuation, cut to `max_words` (50), after `prompt`."""

    keys, where = ("prompt", "max_words"), "text_processor blip_caption"

    def __init__(self, **rules: Any) -> None:
        self.transform = BlipCaption(**rules)
