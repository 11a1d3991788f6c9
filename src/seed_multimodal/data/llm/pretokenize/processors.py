"""What `--image_transform` and `--image_processor` files build: always an `ImageTransform`.

The released processor files name classes of transformers; what those do is read from their preprocessor_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seed_multimodal.config import check_keys, instantiate, load_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform

PROCESSORS = ("transformers.BlipImageProcessor.from_pretrained", "transformers.CLIPImageProcessor.from_pretrained")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def build_transform(path: str | Path) -> ImageTransform:
    """The transform a YAML describes.

    Raises:
        ConfigError: a target that builds no transform, or a processor that does what an `ImageTransform` cannot.
    """
    config = load_yaml(path)
    if config.get("_target_") in PROCESSORS:
        check_keys(map(str, config), ("_target_", "pretrained_model_name_or_path"), str(path))
        return image_processor(str(config.get("pretrained_model_name_or_path")))
    made = instantiate(config)
    if not isinstance(made, ImageTransform):
        raise ConfigError(f"{path}: builds a {type(made).__name__}, not an image transform.")
    return made


def image_processor(folder: str) -> ImageTransform:
    """The transform of a `preprocessor_config.json`: squash (BLIP), or shorter side and centre (CLIP).

    Raises:
        ConfigError: not there, no json, other means, or a crop that is not the resized square.
    """
    file = Path(folder) / "preprocessor_config.json"
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as json ({error}); name an image transform by --image_transform "
                          "instead.") from None
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    if not _near(mean, CLIP_MEAN) or not _near(std, CLIP_STD):
        raise ConfigError(f"{file}: normalises with {mean} and {std}; the tokenizers read CLIP's mean and deviation.")
    size = settings.get("size", 224)
    keep = not isinstance(size, dict) or "shortest_edge" in size
    side = size if not isinstance(size, dict) else size.get("shortest_edge", size.get("height"))
    crop = settings.get("crop_size", side) if keep and settings.get("do_center_crop", True) else side
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if not isinstance(side, int) or crop != side or (not keep and size.get("width") != side):
        raise ConfigError(f"{file}: resizes to {size} and crops {settings.get('crop_size')}; only squares are encoded.")
    resample = settings.get("resample", 3)
    if resample not in RESAMPLE:
        raise ConfigError(f"{file}: unknown resample {resample!r}.")
    return ImageTransform(side, keep, RESAMPLE[resample])


def _near(values: Any, wanted: tuple[float, ...]) -> bool:
    return len(values) == len(wanted) and all(abs(a - b) < 1e-4 for a, b in zip(values, wanted, strict=True))
