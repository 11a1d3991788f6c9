"""LaVIT's pixel decoders: codebook rows of images become conditions of a U-Net, and these an image.

    detokenizer = LavitDetokenizer.from_pretrained("pretrained/LaVIT-7B-v2/highres_pixel_decoding", decoder)
    images = detokenizer(rows, ratio="3:2", seeds=[42])

Two were released. A U-Net of SDXL's kind (`highres_pixel_decoding`) reads prompt and pooled embeddings and sizes;
guidance steers away from zeros. One of Stable Diffusion 1's kind (`pixel_decoding`) reads prompt embeddings alone;
guidance steers away from the empty text's embeddings (`uncond_embeddings.bin`), and the rest of that prompt is masked.
The U-Net reads codes alone, never the words of a request. Sizes, latents and the autoencoder are float32 whatever the
U-Net's precision (in bfloat16 a height of 375 pixels would become 376).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.diffusion.base import Callback, Detokenizer, Generators, SizedSettings, guidance
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.hub import LAVIT_WHERE, find_folder
from seed_multimodal.images.ratios import RATIOS
from seed_multimodal.lavit.decoder import CodeDecoder, Conditions
from seed_multimodal.settings import setting
from seed_multimodal.weights import read_tensor

SIDE = 1024  # of the square one of RATIOS
EMPTY_TEXT = "uncond_embeddings.bin"
NEEDED = ("unet/*", "vae/*", "vae.json", "scheduler/*", EMPTY_TEXT)
CHECKERS = "pixel_decoding"  # the released folder with the safety checker, for both decoders


@dataclass(frozen=True)
class LavitSettings(SizedSettings):
    """Defaults of the original `generate_image`.

    Attributes:
        ratio: one of `RATIOS` instead of height and width. original_size, crops_coords_top_left: SDXL's other size
            conditions, (height, width) and (top, left); None for the image's own size.
    """

    num_inference_steps: int = setting(25, least=1)
    guidance_scale: float = 7.0
    ratio: str | None = setting(None, choices=tuple(RATIOS))
    original_size: tuple[int, int] | None = setting(None, least=1)
    crops_coords_top_left: tuple[int, int] = setting((0, 0), least=0)


class LavitDetokenizer(Detokenizer):
    """Rows of the codebook, or `Conditions` made of them, → images.

    Attributes:
        decoder: rows → conditions; None where conditions are given.
        null_embeds: the empty text's embeddings `[1, L, W]` for a U-Net of Stable Diffusion's kind; None: zeros.
    """

    kind, where = "LaVIT pixel decoder", LAVIT_WHERE
    settings_class = LavitSettings
    part_names = ("decoder", *Detokenizer.part_names)

    def __init__(self, unet: Any, vae: Any, scheduler: Any, *, decoder: CodeDecoder | None = None,
                 null_embeds: Tensor | None = None, **options: Any) -> None:
        super().__init__(unet, vae, scheduler, **options)
        self.decoder, self.null_embeds = decoder, null_embeds

    @classmethod
    def from_pretrained(cls, folder: str | Path, decoder: CodeDecoder | None = None, *, check_safety: bool = False,
                        safety: str | Path | None = None, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> LavitDetokenizer:
        """Load a diffusion folder. A U-Net in a torch file (`.bin`, as released) is read as tensors only.

        Args:
            check_safety: check every image (warns if there is no checker). safety: folder with `safety_checker` and
                `feature_extractor`; None: `folder`, or `pixel_decoding` in the same place.
            dtype: of the U-Net.

        Raises:
            CheckpointError: something is not there (with what to download), damaged, or does not fit the rest.
        """
        place = find_folder(folder, NEEDED, LAVIT_WHERE)
        unet = cls.load_unet(place, dtype)
        width = int(unet.config.cross_attention_dim)
        if decoder is not None and decoder.config.context_dim != width:
            raise CheckpointError(f"{place}: its U-Net reads width {width}, but the decoder of codes writes width "
                                  f"{decoder.config.context_dim}; they do not belong together.")
        checker = {}
        if check_safety:
            home = Path(safety or place)
            checker = cls.load_safety_checker(home) or cls.load_safety_checker(home.parent / CHECKERS)
            if not checker:
                warnings.warn(f"{home}: holds no safety checker, so images are drawn without one.", SeedWarning,
                              stacklevel=2)
        return cls(unet, cls.load_vae(place), cls.load_scheduler(place), decoder=decoder,
                   null_embeds=None if is_sdxl(unet) else read_empty_text(place, width),
                   defaults=cls.read_defaults(place), layout=cls.load_layout(place), **checker).to(device)

    def ratio_size(self, ratio: str) -> tuple[int, int]:
        """Height and width of one of `RATIOS` in this U-Net's size."""
        side, unit = int(self.unet.config.sample_size) * self.factor, max(8, self.factor)
        height, width = (max(unit, round(one * side / SIDE / unit) * unit) for one in RATIOS[ratio])
        return height, width

    def size(self, settings: Any) -> tuple[int, int]:
        """See `Detokenizer`."""
        if settings.ratio is None:
            return super().size(settings)
        if settings.height is not None or settings.width is not None:
            raise ConfigError("Give a ratio, or height and width, not both.")
        return self.ratio_size(settings.ratio)

    def __call__(self, codes: Sequence[Tensor] | Conditions, *, seeds: Sequence[int] | None = None,
                 batch_size: int | None = None, callback: Callback | None = None, **settings: Any
                 ) -> list[Image.Image]:
        """Draw images.

        Args:
            codes: the codebook's rows of each image, `[n, C]`, or their conditions.
            seeds, batch_size, callback: as of `Detokenizer.draw`. settings: fields of `LavitSettings`.

        Raises:
            ConfigError: unknown settings, or out of range.
        """
        rows: dict[str, Any] = dict(codes._asdict()) if isinstance(codes, Conditions) else {"rows": codes}
        return self.draw(rows, seeds, batch_size, callback, self.check_settings(**settings))

    def denoise(self, settings: Any, generators: Generators, rows: Sequence[Tensor] = (),
                prompt_embeds: Tensor | None = None, pooled: Tensor | None = None, features: Tensor | None = None,
                start: Tensor | None = None, callback: Callback | None = None) -> Tensor:
        """Latents `[B, C, h, w]`; start: noise, None for the generators'."""
        if prompt_embeds is None:
            assert self.decoder is not None
            prompt_embeds, pooled, features = self.decoder(rows)
        size, device, dtype = self.size(settings), self.device, self.unet.dtype
        if start is None and self.layout is not None and features is not None:
            height, width = (side // self.factor for side in size)
            start = self.layout.warm_latents(features.to(device), generators, self.scheduler, size=(height, width))
        start = self.noise(generators, size, torch.float32) if start is None else start
        prompt, runs = prompt_embeds.to(device, dtype), 1
        conditions: dict[str, Any] = {}
        if settings.guidance_scale > 1:
            away, mask = unconditional(prompt, self.null_embeds)
            if mask is not None:
                conditions["encoder_attention_mask"] = torch.cat([mask, torch.ones_like(mask)])
            prompt, runs = torch.cat([away, prompt]), 2
        if is_sdxl(self.unet):
            assert pooled is not None
            pooled = pooled.to(device, dtype)
            ids = size_ids(size, original=settings.original_size, crop=settings.crops_coords_top_left,
                           count=len(prompt))
            conditions["added_cond_kwargs"] = {
                "text_embeds": pooled if runs == 1 else torch.cat([torch.zeros_like(pooled), pooled]),
                "time_ids": ids.to(device)}
        return self.sample(start, {"encoder_hidden_states": prompt, **conditions}, guidance(settings.guidance_scale),
                           settings, generators, callback)


def is_sdxl(unet: Any) -> bool:
    """Whether a U-Net reads pooled embeddings and sizes, as SDXL's."""
    return unet.config.addition_embed_type == "text_time"


def unconditional(prompt: Tensor, null_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What guidance steers away from, `[B, N, W]` as a prompt, and which of its embeddings count (None: all)."""
    away = torch.zeros_like(prompt)
    if null_embeds is None:
        return away, None
    length = null_embeds.shape[1]
    away[:, :length] = null_embeds.to(prompt)
    return away, (torch.arange(prompt.shape[1], device=prompt.device) < length).expand(len(prompt), -1)


def read_empty_text(place: Path, width: int) -> Tensor:
    """The empty text's embeddings `[1, L, W]` of a folder of the second kind.

    Raises:
        CheckpointError: not there, or of another size.
    """
    file = place / EMPTY_TEXT
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file, which a U-Net of Stable Diffusion 1's kind needs; "
                              f"{LAVIT_WHERE}.")
    value = read_tensor(file)
    value = value if value.ndim == 3 else value[None]
    if value.ndim != 3 or len(value) != 1 or value.shape[2] != width:
        raise CheckpointError(f"{file}: must hold a tensor [1, L, {width}], got {list(value.shape)}.")
    return value.float()
