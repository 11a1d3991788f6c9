"""Image encoder from a tokenizer's YAML, on one device; and image transforms of YAML files."""

from __future__ import annotations

import inspect
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.device import DTYPES, choose_device, copy_to
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import PROCESSOR, ImageTransform, read_preprocessing
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.pipelines.images import CodeCodec

PROCESSORS = (
    "transformers.BlipImageProcessor.from_pretrained",
    "transformers.CLIPImageProcessor.from_pretrained",
)


class Encoder:
    """Images → codes, by any family's tokenizer that makes codes.

    tokenizer: YAML file (original form), the same as a mapping, or a folder of a system or of its
        tokenizer.
    dtype: auto: float16 on CUDA where the original has it and the YAML does not say `fp16: False`,
        else float32.
    fingerprint: checksum of names and values of the weights.
    """

    def __init__(
        self, tokenizer: str | Mapping[str, Any], device: str, dtype: str, compile: bool
    ) -> None:
        self.device = choose_device(device, "float32", log=None).device
        is_cuda = self.device.type == "cuda"
        if is_cuda:  # else page-locked memory is allocated through the first GPU
            torch.cuda.set_device(self.device)

        # 1. The network: a tokenizer of the original's has a codec, which has the network.
        opened = _instantiate(tokenizer, str(self.device))
        codec = getattr(opened, "images", opened)
        if not isinstance(codec, CodeCodec):
            raise ConfigError("tokenizer: its configuration does not build a tokenizer of images.")
        network = codec.network
        self.fingerprint = _checksum(network)
        self.transform = codec.transform

        # 2. Its precision.
        precision = torch.float32
        if dtype != "auto":
            precision = DTYPES[dtype]
        elif is_cuda and opened.fp16:
            precision = torch.float16
        self._encode = fast_encode(network, precision, compile=compile)

    def __call__(self, pixels: Tensor) -> list[list[int]]:
        """Codes of images uint8 [B, 3, S, S]; of variable length where a row is padded with -1."""
        codes = self._encode(self.transform.normalise(copy_to(self.device, pixels))).tolist()
        return [[code for code in row if code >= 0] for row in codes]


def fast_encode(
    network: nn.Module, dtype: torch.dtype, *, compile: bool = False
) -> Callable[[Tensor], Tensor]:
    """A faster `network.encode`; the network is changed in place.

    dtype: fp16 converts the whole model, as in the original; bf16 has too few bits for the sums of
        39 blocks, so only matrix products are computed in it, under autocast.
    compile: compile each block; a new batch size is compiled at its first call.
    """
    # 1. Precision.
    use_autocast = dtype == torch.bfloat16
    if use_autocast:
        cast_layers(network, dtype)
    else:
        network.to(dtype)

    # 2. One compiled block serves all of a list, which have the same shapes.
    if compile:
        for module in network.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.compile()

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=use_autocast):
            return network.encode(images)

    return encode


def _checksum(model: nn.Module) -> str:
    checksum = 0
    for name, value in sorted(model.state_dict().items()):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(value.cpu().float().contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def _instantiate(config: str | Mapping[str, Any], device: str) -> Any:
    """The object of a tokenizer's configuration, without its diffusion model."""
    label = "tokenizer"
    if isinstance(config, str):
        label = config
        if os.path.isdir(config):
            config = {"_target_": "seed_multimodal.pipelines.images.open_images", "name": config}
        else:
            config = load_yaml(config)
    target = find_target(str(config.get("_target_")), label)
    options: dict[str, Any] = {"load_diffusion": False, "device": device, "dtype": "float32"}
    parameters = inspect.signature(target).parameters
    options = {key: value for key, value in options.items() if key in parameters}
    return instantiate(dict(config), **options)


def read_transform(path: str | Path | None, default: ImageTransform) -> ImageTransform:
    """The image transform of a YAML (`--image_transform`, `--image_processor`), by default the
    tokenizer's, with the tokenizer's mean and deviation.

    Raises ConfigError: another image size than the tokenizer's; a processor with another mean.
    """
    if path is None:
        return default
    config = load_yaml(path)
    transform: ImageTransform
    if config.get("_target_") in PROCESSORS:
        folder = config["pretrained_model_name_or_path"]
        transform = read_preprocessing(folder, "use --image_transform instead")
        if (transform.mean, transform.std) != (default.mean, default.std):
            raise ConfigError(
                f"{Path(folder) / PROCESSOR}: normalizes with {list(transform.mean)} and "
                f"{list(transform.std)}; the tokenizer's vision encoder expects "
                f"{list(default.mean)} and {list(default.std)}."
            )
    else:
        transform = instantiate(config)
    size = transform.image_size
    if size != default.image_size:
        raise ConfigError(
            f"{path}: outputs images of {size} x {size} pixels, but the tokenizer "
            f"expects {default.image_size} x {default.image_size}."
        )
    return default.with_resizing_of(transform)
