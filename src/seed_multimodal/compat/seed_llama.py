"""The original repositories' objects: SEED-LLaMA's tokenizer, and SEED-1.

    tokenizer = SeedLlamaTokenizer.from_pretrained("pretrained/seed_tokenizer")
    codes = tokenizer.encode_image(image_path="cat.jpg")                 # [1, 32]
    images = tokenizer.decode_image(codes, negative_indices=other)       # [PIL]
    text = tokenizer.bos_token + "USER: hello"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    model = Seed1.from_pretrained("pretrained")
    images = model.reconstruct(["images/cat.jpg"])           # or model.draw(model.tokenize([…]))

Names, defaults and results are the originals'. Differences: image generation is seeded,
de-tokenizers load on first use, batches of any size are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.io import ImageSource
from seed_multimodal.language.llama_tokenizer import LlamaTokenizer
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.checkpoints import SEED1
from seed_multimodal.models.seed.configuration import Seed1Config
from seed_multimodal.models.seed.diffusion import SD_ADVICE, SD_FOLDER, StableDiffusionDetokenizer
from seed_multimodal.models.seed.modeling import Seed1Tokenizer
from seed_multimodal.models.seed.pipeline import SeedImageCodec, load_images
from seed_multimodal.models.seed.spec import DETOKENIZER_FOLDER, SeedLlamaConfig
from seed_multimodal.pipelines.images import Log, Placement, Seed, seed_per_image
from seed_multimodal.weights.catalogue import catalogue
from seed_multimodal.weights.find import locate, locate_or_same

Codes = Tensor | Sequence[int] | Sequence[Sequence[int]]
# Stable Diffusion next to SEED-1's tokenizer.
DIFFUSION_NAMES = (DETOKENIZER_FOLDER, "stable-diffusion-v1-4", "sd-v1-4.ckpt")


def tokenizer_config(
    tokenizer: str | Path, diffusion_path: str | Path | None = None
) -> SeedLlamaConfig:
    """The original SEED-LLaMA with another tokenizer and diffusion model, folders or hub names.

    diffusion_path: None, or that of the original: a copy in the tokenizer's folder, else
        `pretrained/stable-diffusion-2-1-unclip`.
    """
    unclip = catalogue().parts["unclip"]
    if diffusion_path in (unclip.folder, unclip.hub):
        diffusion_path = None
    config = SeedLlamaConfig.find("8b", tokenizer=tokenizer, detokenizer=diffusion_path)
    config.override(detokenizer=config.detokenizer)
    config.image_size = None
    return config


class ImageTokenizer:
    """`SeedLlamaTokenizer.image_tokenizer`: images ⇄ codes, by `model` and `diffusion_model`.

    decode: the tokenizer's `decode_image`.
    """

    def __init__(self, images: SeedImageCodec, decode: Callable[..., list[Image.Image]]) -> None:
        self.images = images
        self.decode = decode
        self.processor = images.model.visual_encoder.preprocessing

    @property
    def model(self) -> torch.nn.Module:
        """The image tokenizer's network."""
        return self.images.model

    @property
    def diffusion_model(self) -> Detokenizer:
        """The de-tokenizer, loaded on first use."""
        return self.images.decoder

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.images.device

    def __len__(self) -> int:
        return int(self.images.model.config.codebook_size)

    def to(self, device: str | torch.device) -> Self:
        """Move the network, and the de-tokenizer if it is loaded; returns itself."""
        self.images.to(device)
        return self

    def encode(self, image_torch: Tensor) -> Tensor:
        """Normalised pixels `[3, S, S]` or `[B, 3, S, S]` → codes `[B, 32]` on the device."""
        pixels = image_torch.reshape(-1, *image_torch.shape[-3:])
        return self.images.encode_pixels(pixels).to(self.device)


class SeedLlamaTokenizer(LlamaTokenizer):
    """Text ⇄ ids as a slow LLaMA tokenizer, images ⇄ codes.

    `text` and `images` can also be used directly.
    """

    def __init__(
        self, text: MultimodalTokenizer, images: SeedImageCodec, *, fp16: bool = True
    ) -> None:
        super().__init__(text)
        self.images = images
        self.fp16 = fp16
        self.image_tokenizer = ImageTokenizer(images, self.decode_image)
        self.processor = self.image_tokenizer.processor

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        fp16: bool = True,
        load_diffusion: bool = False,
        encoder_url: str | None = None,
        diffusion_path: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> Self:
        """The SEED-2 tokenizer of a folder, or of a hub name whose files are in the local cache.

        fp16: float16 on CUDA devices; False: float32.
        load_diffusion: load the de-tokenizer now rather than when the first image is drawn.
        encoder_url: without effect; `seed_quantizer.pt` of the folder is read.
        diffusion_path: see `tokenizer_config`.
        dtype: a precision, which overrides `fp16`.

        Raises:
            CheckpointError: a missing part, with download instructions.
        """
        # 1. Folders.
        config = tokenizer_config(pretrained_model_name_or_path, diffusion_path)
        folder = config.path("tokenizer")

        # 2. Device and precision.
        if dtype == "auto" and not fp16:
            dtype = "float32"
        runtime = choose_device(device, dtype, fp16=FP16_AS_ORIGINAL)

        # 3. The tokenizers.
        images = load_images(config, Placement(runtime, runtime, runtime))
        if load_diffusion:
            _ = images.decoder
        return cls(MultimodalTokenizer.from_pretrained(folder), images, fp16=fp16)

    @property
    def num_image_tokens(self) -> int:
        """Number of codes."""
        return self.text.vocabulary.n_codes

    @property
    def device(self) -> torch.device:
        """Device of the image tokenizer."""
        return self.images.device

    def to(self, device: str | torch.device) -> Self:
        """Move the image tokenizer; returns itself."""
        self.image_tokenizer.to(device)
        return self

    def load_image_tokenizer(self) -> None:
        """Nothing: the image tokenizer is loaded with the tokenizer."""

    def encode_image(
        self,
        image_path: str | Path | None = None,
        image_pil: Image.Image | None = None,
        image_torch: Tensor | None = None,
        image_size: int | None = None,
    ) -> Tensor:
        """An image → codes `[B, 32]` on the device.

        image_path: a file.
        image_torch: normalised pixels `[3, S, S]` or `[B, 3, S, S]`.
        image_size: without effect.
        """
        # Pixels are encoded as they are; others are opened and resized.
        sources = [image for image in (image_path, image_pil, image_torch) if image is not None]
        if len(sources) != 1:
            raise ConfigError(
                f"encode_image needs exactly one of image_path, image_pil and image_torch, not "
                f"{len(sources)}."
            )
        if image_torch is None:
            image_torch = self.processor(self.images.open(sources[0]))
        return self.image_tokenizer.encode(image_torch)

    def decode_image(
        self,
        indices: Codes,
        negative_indices: Codes | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        *,
        seed: Seed = 0,
        **settings: Any,
    ) -> list[Image.Image]:
        """Codes `[B, 32]` (or one row) → B images; negative codes: one row, or one each."""
        # Both may be None, for the folder's defaults. An image has 32 codes.
        settings |= {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        rows = torch.as_tensor(indices).reshape(-1, 32)
        if negative_indices is not None:
            settings["negative_codes"] = torch.as_tensor(negative_indices).reshape(-1, 32)
        return self.images.draw(rows, seeds=seed_per_image(seed, len(rows)), **settings)


class Seed1:
    """SEED-1: images ⇄ 32 codes, drawn by Stable Diffusion.

    `tokenizer` and `images` can also be used directly.
    """

    def __init__(
        self,
        tokenizer: Seed1Tokenizer,
        load_decoder: Callable[[], Detokenizer] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        runtime = Runtime(device or tokenizer.device, torch.float32)
        placement = Placement(runtime, runtime, runtime)
        self.images = SeedImageCodec(tokenizer, tokenizer.visual_encoder.preprocessing, placement)
        self.images.load_decoder = load_decoder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = "pretrained",
        *,
        diffusion: str | Path | None = None,
        vision: str | Path | None = None,
        config: Seed1Config | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        safety_checker: bool = True,
        diffusion_config: str | Path | None = None,
        log: Log = print,
    ) -> Self:
        """Load the tokenizer now, and Stable Diffusion 1 when the first image is drawn.

        folder: see `models.seed.checkpoints`.
        diffusion: a diffusers folder, or the original's `sd-v1-4.ckpt`; None: in or next to
            `folder`, else in `pretrained/`.
        vision: file of the vision encoder.
        config: sizes of weights without config.json that are not of the original width.
        diffusion_config: the YAML file of `sd-v1-4.ckpt`.

        Raises:
            CheckpointError: missing (with download instructions) or damaged weights.
        """
        # 1. Both parts must exist before the first is loaded.
        path = locate_or_same(folder)  # of a hub name in the local cache
        is_file = path.is_file()
        if not diffusion:
            # Next to the tokenizer, else its usual folder.
            names = [(path.parent if is_file else path) / name for name in DIFFUSION_NAMES]
            diffusion = next((name for name in names if name.exists()), Path(SD_FOLDER))
        diffusion_path = locate(diffusion)
        missing: list[str] = []
        if not is_file and not (path / "config.json").is_file():
            if len(SEED1.find(path)) < len(SEED1.files):
                missing.append(SEED1.advice(path))
        if diffusion_path is None:
            missing.append(SD_ADVICE)
        if missing:
            raise CheckpointError(
                f"the weights of SEED-1 are not on this disk: {', and '.join(missing)}."
            )
        assert diffusion_path is not None

        # 2. Loading; images are drawn in the tokenizer's precision.
        runtime = choose_device(device, dtype, log, fp16=FP16_AS_ORIGINAL)
        tokenizer = Seed1Tokenizer.from_pretrained(
            path, vision=vision, config=config, device=runtime.device, dtype=runtime.dtype, log=log
        )
        load_decoder = partial(
            StableDiffusionDetokenizer.from_pretrained,
            diffusion_path,
            dtype=runtime.dtype,
            safety_checker=safety_checker,
            config=diffusion_config,
        )
        return cls(tokenizer, load_decoder, runtime.device)

    def tokenize(self, images: Sequence[ImageSource]) -> Tensor:
        """Images (files, bytes, PIL) → codes `[B, 32]` int64 on the CPU."""
        return self.images.encode(images)

    def draw(
        self, codes: Codes, *, seed: Seed = 42, batch_size: int = 6, **settings: Any
    ) -> list[Image.Image]:
        """Codes `[B, 32]` → B images; `settings`: of `StableDiffusionDetokenizer`."""
        seeds = seed_per_image(seed, len(codes))
        return self.images.draw(codes, seeds=seeds, batch_size=batch_size, **settings)

    def reconstruct(self, images: Sequence[ImageSource], **options: Any) -> list[Image.Image]:
        """Images → images of their codes; `options`: of `draw`."""
        return self.draw(self.tokenize(images), **options)
