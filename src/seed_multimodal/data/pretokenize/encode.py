"""The encoder: a tokenizer's YAML → codes of batches of images, on one device; and image transforms of YAML files."""

from __future__ import annotations

import inspect
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.device import DTYPES, choose_device, copy_to, is_out_of_memory
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.images.transforms import CLIP_MEAN, ImageTransform, normalise
from seed_multimodal.seed.modeling import fast_encode
from seed_multimodal.settings import setting

PROCESSORS = ("transformers.BlipImageProcessor.from_pretrained", "transformers.CLIPImageProcessor.from_pretrained")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class EncoderSettings:
    """Where and how codes are computed; `dtype` auto: float16 on CUDA as in the original, float32 elsewhere and where
    the tokenizer's YAML says `fp16: False`."""

    tokenizer: str | Mapping[str, Any]  # its YAML (the original form), that as a mapping, or a tokenizer's folder
    device: str = "auto"
    dtype: str = setting("auto", choices=("auto", *sorted(DTYPES)))
    compile: bool = False  # takes minutes before the first image


class Encoder:
    """Images → codes. `fingerprint`: checksum of the tokenizer's weights."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.device = choose_device(settings.device, "float32", log=None).device
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # else page-locked memory would be made through the first GPU
        opened = _instantiate(settings.tokenizer, str(self.device))
        codec = getattr(opened, "images", opened)
        model = getattr(codec, "model", None)
        if model is None or not hasattr(model, "encode"):
            raise ConfigError("tokenizer: its configuration builds no image encoder.")
        self.fingerprint = fingerprint(model)
        self.image_size: int = model.config.vit.image_size
        self.transform: ImageTransform = codec.transform
        half = self.device.type == "cuda" and getattr(opened, "fp16", True)
        dtype = DTYPES[settings.dtype] if settings.dtype != "auto" else torch.float16 if half else torch.float32
        self._encode = fast_encode(model, dtype, compile=settings.compile)

    def __call__(self, pixels: Tensor) -> list[list[int]]:
        """Codes of images, uint8 [B, 3, S, S]; LaVIT's have fewer where there is less to see. Raises ConfigError: so
        many do not fit into memory."""
        try:
            codes = self._encode(normalise(copy_to(self.device, pixels))).tolist()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(f"{len(pixels)} images at once do not fit into the memory of {self.device} "
                              f"({first_line(error)}); give a smaller --batch_size.") from error
        return [[code for code in row if code >= 0] for row in codes]


def _instantiate(config: str | Mapping[str, Any], device: str) -> Any:
    where = config if isinstance(config, str) else "tokenizer"
    if isinstance(config, str) and os.path.isdir(config):
        config = {"_target_": "seed_multimodal.system.images.open_images", "name": config}
    node = load_yaml(config) if isinstance(config, str) else config
    target = find_target(str(node.get("_target_")), where)
    offered: dict[str, Any] = {"load_diffusion": False, "device": device, "dtype": "float32"}
    known = inspect.signature(target).parameters
    return instantiate(dict(node), **{key: value for key, value in offered.items() if key in known})


def fingerprint(model: torch.nn.Module) -> str:
    """A checksum of the names and float32 values of a model's weights."""
    checksum = 0
    for name, value in sorted(model.state_dict().items()):
        checksum = zlib.crc32(value.detach().cpu().float().contiguous().numpy(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def read_transform(path: str | Path | None, own: ImageTransform, image_size: int) -> ImageTransform:
    """The image transform of a YAML (`--image_transform`, `--image_processor`), or the tokenizer's own. Raises
    ConfigError: its output does not fit the tokenizer."""
    if path is None:
        return ImageTransform(image_size, own.keep_ratio, own.interpolation)
    made = build_transform(path)
    if made.image_size != image_size:
        raise ConfigError(f"{path}: makes images of {made.image_size} x {made.image_size} pixels, but the tokenizer "
                          f"reads {image_size} x {image_size}.")
    return made


def build_transform(path: str | Path) -> ImageTransform:
    """The transform that a YAML describes. Raises ConfigError: a target that builds none."""
    config = load_yaml(path)
    if config.get("_target_") in PROCESSORS:
        return image_processor(str(config.get("pretrained_model_name_or_path")))
    made = instantiate(config)
    if not isinstance(made, ImageTransform):
        raise ConfigError(f"{path}: builds a {type(made).__name__}, not an image transform.")
    return made


def image_processor(folder: str) -> ImageTransform:
    """The transform of a `preprocessor_config.json`: squash (BLIP), or shorter side and centre (CLIP). Raises
    ConfigError: not there, no json, other means, or a crop that is not the resized square."""
    file = Path(folder) / "preprocessor_config.json"
    settings = read_json_object(file, ConfigError, "name an image transform by --image_transform instead")
    if settings.get("image_mean", CLIP_MEAN)[0] != CLIP_MEAN[0]:
        raise ConfigError(f"{file}: normalises with {settings['image_mean']}; the tokenizers read CLIP's mean.")
    size = settings.get("size", 224)
    keep = not isinstance(size, dict) or "shortest_edge" in size
    side: Any = size if not isinstance(size, dict) else size.get("shortest_edge", size.get("height"))
    crop = settings.get("crop_size", side) if keep and settings.get("do_center_crop", True) else side
    if side not in (crop, isinstance(crop, dict) and crop["height"]) or (not keep and size["width"] != side):
        raise ConfigError(f"{file}: resizes to {size} and crops {settings.get('crop_size')}; only squares are encoded.")
    return ImageTransform(side, keep, RESAMPLE[settings.get("resample", 3)])
