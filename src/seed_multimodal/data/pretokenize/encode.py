"""Image encoder from a tokenizer's YAML, on one device; and image transforms of YAML files."""

from __future__ import annotations

import inspect
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.device import DTYPES, choose_device, copy_to
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate
from seed_multimodal.images.transforms import CLIP_MEAN, ImageTransform, normalise
from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.lavit.modeling import MODES, DynamicTokenizer
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.seed.modeling import fast_encode

PROCESSORS = (
    "transformers.BlipImageProcessor.from_pretrained",
    "transformers.CLIPImageProcessor.from_pretrained",
)
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Encoder:
    """Images → codes; `fingerprint`: checksum of names and values of the weights.

    `tokenizer`: YAML file (original form), the same as a mapping, or a tokenizer's folder. `dtype` auto: float16 on
    CUDA as in the original, float32 elsewhere or with `fp16: False` in the YAML.
    """

    def __init__(
        self, tokenizer: str | Mapping[str, Any], device: str, dtype: str, compile: bool
    ) -> None:
        self.device = choose_device(device, "float32", log=None).device
        if self.device.type == "cuda":
            torch.cuda.set_device(
                self.device
            )  # else page-locked memory is allocated through the first GPU
        opened = _instantiate(tokenizer, str(self.device))
        codec = getattr(opened, "images", opened)
        model = getattr(codec, "model", None)
        if model is None or not hasattr(model, "encode"):
            raise ConfigError("tokenizer: its configuration does not build an image encoder.")
        checksum = 0
        for name, value in sorted(model.state_dict().items()):
            checksum = zlib.crc32(
                value.cpu().float().contiguous().numpy(), zlib.crc32(name.encode(), checksum)
            )
        self.fingerprint = f"{checksum:08x}"
        self.transform: ImageTransform = codec.transform
        half = self.device.type == "cuda" and getattr(opened, "fp16", True)
        precision = DTYPES[dtype] if dtype != "auto" else torch.float16 if half else torch.float32
        self._encode = fast_encode(model, precision, compile=compile)

    def __call__(self, pixels: Tensor) -> list[list[int]]:
        """Codes of images uint8 [B, 3, S, S]; variable length for LaVIT."""
        codes = self._encode(normalise(copy_to(self.device, pixels))).tolist()
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


def read_transform(path: str | Path | None, own: ImageTransform) -> ImageTransform:
    """The image transform of a YAML (`--image_transform`, `--image_processor`), by default the tokenizer's. Raises
    ConfigError: another image size than the tokenizer's."""
    if path is None:
        return own
    config = load_yaml(path)
    is_processor = config.get("_target_") in PROCESSORS
    made: ImageTransform = (
        image_processor(config["pretrained_model_name_or_path"])
        if is_processor
        else instantiate(config)
    )
    if made.image_size != own.image_size:
        raise ConfigError(
            f"{path}: outputs images of {made.image_size} x {made.image_size} pixels, but the tokenizer "
            f"expects {own.image_size} x {own.image_size}."
        )
    return made


def image_processor(folder: str) -> ImageTransform:
    """The transform of a `preprocessor_config.json`: squash (BLIP), or resize and centre crop (CLIP). Raises
    ConfigError: missing, not JSON, or another mean."""
    file = Path(folder) / "preprocessor_config.json"
    settings = read_json_object(file, ConfigError, "use --image_transform instead")
    if settings.get("image_mean", CLIP_MEAN)[0] != CLIP_MEAN[0]:
        raise ConfigError(
            f"{file}: normalizes with {settings['image_mean']}; the tokenizers expect CLIP's mean."
        )
    size = settings.get("size", 224)
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    side: Any = size.get("shortest_edge", size.get("height"))
    return ImageTransform(side, "shortest_edge" in size, RESAMPLE[settings.get("resample", 3)])


# ---- LaVIT's dynamic tokenizer, with a variable number of codes per image


class DynamicCodes(nn.Module):
    """`encode`: normalized pixels `[B, 3, S, S]` → codes `[B, N]`, padded with -1."""

    def __init__(self, tokenizer: DynamicTokenizer, selection: str, seed: int) -> None:
        super().__init__()
        self.tokenizer, self.selection, self.seed = tokenizer, selection, seed
        self.device = tokenizer.device
        # Part of the encoder's fingerprint, since it changes the codes.
        self.register_buffer("drawn_by", torch.tensor([MODES.index(selection), seed]))

    def to(self, dtype: torch.dtype) -> Self:  # type: ignore[override]
        """Convert the layers to a dtype; the rest stays fp32."""
        cast_layers(self.tokenizer, dtype)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See the class."""
        generators = [
            torch.Generator().manual_seed(zlib.crc32(one.numpy().tobytes(), self.seed))
            for one in pixels.cpu().contiguous()
        ]
        found = self.tokenizer.encode(pixels, mode=self.selection, generator=generators)
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def lavit_codes(
    pretrained_model_name_or_path: str, selection: str = "draw", seed: int = 0, device: str = "cpu"
) -> Any:
    """`model` and `transform` for `encode.Encoder`. Raises CheckpointError, as `load_dynamic_tokenizer`."""
    folder = locate(pretrained_model_name_or_path) or pretrained_model_name_or_path
    tokenizer = load_dynamic_tokenizer(folder, device=device)
    return SimpleNamespace(
        model=DynamicCodes(tokenizer, selection, seed), transform=tokenizer.transform, fp16=False
    )
