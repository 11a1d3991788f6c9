"""The encoder: a tokenizer's YAML → codes of batches of bytes, on one device; and the fingerprint of its weights.

On CUDA compiled and in half precision (`fast_encode`), elsewhere plain in float32, unless asked otherwise. Weights are
read in float32 either way, so that the fingerprint is the same on every device.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.device import DTYPES, choose_device, copy_to, is_out_of_memory
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, normalise
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.seed.modeling import SeedTokenizer, fast_encode
from seed_multimodal.settings import check_keys, setting

PROCESSORS = ("transformers.BlipImageProcessor.from_pretrained", "transformers.CLIPImageProcessor.from_pretrained")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class EncoderSettings:
    """Where and how codes are computed.

    Attributes:
        tokenizer: its YAML (the released form), that as a mapping, or the folder of a tokenizer or a system.
        dtype: `auto`: float16 on CUDA as released, float32 elsewhere and where the tokenizer's YAML says `fp16: False`.
        compile: compile the encoder (minutes before the first image); None: SEED's on CUDA, unless that fails.
    """

    tokenizer: str | Mapping[str, Any]
    device: str = "auto"
    dtype: str = setting("auto", choices=("auto", *sorted(DTYPES)))
    compile: bool | None = None


class Encoder:
    """Pictures → codes; `fingerprint`: sha256 of the tokenizer's weights.

    Attributes:
        most: pictures that are encoded at once; halved whenever they did not fit into memory.
        compiled: whether the encoder is compiled.
    """

    def __init__(self, settings: EncoderSettings, log: Callable[[str], None] = log_line) -> None:
        self.device = choose_device(settings.device, "float32", log=None).device
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # else page-locked memory would be made through the first GPU
        opened = _instantiate(settings.tokenizer, str(self.device))
        codec = getattr(opened, "images", opened)
        model = getattr(codec, "model", None)
        if model is None or not hasattr(model, "encode"):
            raise ConfigError("tokenizer: its configuration builds no picture encoder.")
        self.fingerprint = fingerprint(model)
        self.image_size: int = model.config.vit.image_size
        self.transform: ImageTransform = codec.transform
        text = getattr(opened, "text", None)  # its words fit, else they had been refused
        self.vocabulary: ImageVocabulary = text.vocabulary if text is not None else ImageVocabulary(
            n_codes=model.config.codebook_size, tokens_per_image=model.config.num_query)
        on_gpu = self.device.type == "cuda"
        half = on_gpu and getattr(opened, "fp16", True)  # `fp16: False` in the tokenizer's YAML
        dtype = DTYPES[settings.dtype] if settings.dtype != "auto" else torch.float16 if half else torch.float32
        self.dtype = str(dtype).removeprefix("torch.")
        self._log, self.most = log, sys.maxsize
        compiled = on_gpu and isinstance(model, SeedTokenizer)
        self.compiled = compiled if settings.compile is None else settings.compile
        self._encode_pixels = fast_encode(model, dtype, compile=self.compiled)
        if self.compiled and settings.compile is None:
            self.compiled = compiles(self._encode_pixels, self.image_size, self.device, log)

    def start(self, rows: Sequence[Tensor]) -> Codes:
        """Begin to encode pictures, uint8 [3, S, S] each; on a GPU this returns before it is done.

        Where so many do not fit into memory, they are encoded in halves, and so are all later ones.

        Raises:
            ConfigError: not even one picture fits.
        """
        while True:
            count = min(self.most, len(rows))
            try:
                parts = [self._encode(rows[at:at + count]) for at in range(0, len(rows), count)]
                return Codes(parts[0] if len(parts) == 1 else torch.cat(parts))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise ConfigError(f"Not even one picture fits into the memory of {self.device} "
                                      f"({first_line(error)}); end what else uses it.") from error
            # After the handler: until then the error holds on to the batch's memory.
            self.most = count // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._log(f"{count} pictures at once do not fit into the memory of {self.device}: {self.most} from now on "
                      f"(--batch_size {self.most} starts so); nothing is lost.")

    def _encode(self, rows: Sequence[Tensor]) -> Tensor:
        """Codes of one batch, [B, tokens_per_image] int32 on the device; -1 behind those of a picture with fewer."""
        on_gpu = self.device.type == "cuda"  # the copy from page-locked memory overlaps with decoding the next batch
        pixels = torch.empty((len(rows), *rows[0].shape), dtype=torch.uint8, pin_memory=on_gpu)
        torch.stack(tuple(rows), out=pixels)
        return self._encode_pixels(normalise(copy_to(self.device, pixels))).to(torch.int32)


def compiles(encode: Callable[[Tensor], Tensor], size: int, device: torch.device, log: Callable[[str], None]) -> bool:
    """Whether a compiled encoder runs on this machine; if not, it is computed uncompiled from now on."""
    log("compiling the encoder, which takes minutes (--no-compile starts at once) …")
    try:
        encode(torch.zeros(1, 3, size, size, device=device))
    except RuntimeError as error:  # also those of the compiler
        if is_out_of_memory(error):
            raise
        log(f"the encoder cannot be compiled here ({first_line(error)}); it runs uncompiled, somewhat slower.")
        torch.compiler.reset()
        torch.compiler.set_stance("force_eager")
        return False
    return True


class Codes:
    """Codes being computed: `result()` waits for them, [B, tokens_per_image] on the CPU."""

    def __init__(self, codes: Tensor) -> None:
        self._codes, self._done = codes, None
        if codes.device.type == "cuda":
            self._codes = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
            self._codes.copy_(codes, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(codes.device))

    def result(self) -> Tensor:
        """The codes."""
        if self._done is not None:
            self._done.synchronize()
        return self._codes.cpu()


def _instantiate(config: str | Mapping[str, Any], device: str) -> Any:
    where = config if isinstance(config, str) else "tokenizer"
    if isinstance(config, str) and os.path.isdir(config):
        config = {"_target_": "seed_multimodal.configured.image_codec", "model": config}
    node = load_yaml(config) if isinstance(config, str) else config
    target = find_target(str(node.get("_target_")), where)
    offered: dict[str, Any] = {"load_diffusion": False, "device": device, "dtype": "float32"}
    known = inspect.signature(target).parameters
    return instantiate(dict(node), **{key: value for key, value in offered.items() if key in known})


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """sha256 over names, shapes and float32 values of a model's weights, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        plain = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        digest.update(plain.contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_transform(path: str | Path | None, own: ImageTransform, image_size: int) -> ImageTransform:
    """The picture transform of a YAML (`--image_transform`, `--image_processor`), or the tokenizer's own.

    Raises:
        ConfigError: its output does not fit the tokenizer.
    """
    if path is None:
        return ImageTransform(image_size, own.keep_ratio, own.interpolation)
    made = build_transform(path)
    if made.image_size != image_size:
        raise ConfigError(f"{path}: makes pictures of {made.image_size} x {made.image_size} pixels, but the tokenizer "
                          f"reads {image_size} x {image_size}.")
    return made


def build_transform(path: str | Path) -> ImageTransform:
    """The transform a YAML describes.

    Raises:
        ConfigError: a target that builds no transform, or a processor with steps that `ImageTransform` lacks.
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
