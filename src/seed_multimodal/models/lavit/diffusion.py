"""LaVIT's pixel decoders: codebook rows → conditions of a U-Net → image.

    folder = "pretrained/LaVIT-7B-v2/highres_pixel_decoding"
    detokenizer = LavitDetokenizer.from_pretrained(folder, decoder)
    images = detokenizer(rows, ratio="3:2", seeds=[42])

The original has two. An SDXL-class U-Net (`highres_pixel_decoding`) is conditioned on prompt and
pooled embeddings and sizes; its unconditional embeddings are zeros. A Stable Diffusion 1 U-Net
(`pixel_decoding`) is conditioned on prompt embeddings; its unconditional ones are those of the
empty text (`uncond_embeddings.bin`), with the other positions masked. Sizes are always float32 (in
bfloat16 a height of 375 pixels would become 376).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.base import (
    Denoising,
    Detokenizer,
    DrawingSettings,
    empty_prompt,
    guidance,
)
from seed_multimodal.diffusion.conditioner import Conditioner, Generators
from seed_multimodal.diffusion.networks import DenoiserConditions
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.models.lavit.decoder import CodeDecoder, Conditions
from seed_multimodal.models.lavit.ratios import RATIOS, ratio_size
from seed_multimodal.settings import setting
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file, find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import BaseImageProcessor, PreTrainedModel

EMPTY_TEXT = "uncond_embeddings.bin"
NEEDED = ("unet/*", "vae/*", "scheduler/*", EMPTY_TEXT)


@dataclass(frozen=True)
class LavitSettings(DrawingSettings):
    """Defaults of the original `generate_image`.

    Attributes:
        ratio: one of `RATIOS`, without height and width.
        original_size, crops_coords_top_left: SDXL's other size conditions, (height, width) and
            (top, left).
    """

    num_inference_steps: int = setting(25, minimum=1, maximum=1000)
    guidance_scale: float = 7.0
    ratio: str | None = setting(None, choices=tuple(RATIOS))
    original_size: tuple[int, int] | None = setting(None, minimum=1)
    crops_coords_top_left: tuple[int, int] = setting((0, 0), minimum=0)


class LavitDetokenizer(Detokenizer[LavitSettings]):
    """Rows of the codebook of each image, `[n, C]`, → images.

    null_embeds: the empty text's embeddings `[1, L, W]`, for Stable Diffusion 1; None: zeros.
    """

    label = "LaVIT pixel decoder"
    download_hint = download_advice("lavit")
    settings_class = LavitSettings
    part_names = ("decoder", *Detokenizer.part_names)
    folders = ("scheduler", "unet", "vae")

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        *,
        decoder: CodeDecoder | None = None,
        null_embeds: Tensor | None = None,
        defaults: LavitSettings | None = None,
        conditioner: Conditioner | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
    ) -> None:
        super().__init__(
            unet,
            vae,
            scheduler,
            defaults=defaults,
            conditioner=conditioner,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.decoder = decoder
        self.null_embeds = null_embeds

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        decoder: CodeDecoder | None = None,
        *,
        safety: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LavitDetokenizer:
        """Load a diffusion folder.

        safety: folder with the checker of all images (a warning if it has none); None: unchecked.
        dtype: of the U-Net.

        Raises:
            CheckpointError: missing (with download instructions), damaged or mismatched parts.
        """
        # 1. U-Net, VAE and noise schedule.
        folder = find_folder(folder, NEEDED, download_advice("lavit"))
        cls.check_parts(folder, *cls.folders)
        parts = cls.load_parts(folder, dtype, *cls.folders)
        unet = parts["unet"]
        width = int(unet.config.cross_attention_dim)
        if decoder is not None and decoder.config.context_dim != width:
            raise CheckpointError(
                f"{folder}: its U-Net reads width {width}, but the decoder of codes writes width "
                f"{decoder.config.context_dim}; they do not belong together."
            )

        # 2. The safety checker, from another folder.
        if safety is not None and (Path(safety) / "safety_checker").is_dir():
            for name in ("safety_checker", "feature_extractor"):
                parts[name] = cls.load_part(Path(safety), name)
        elif safety is not None:
            warnings.warn(
                f"{safety}: holds no safety checker, so images are drawn without one.",
                SeedWarning,
                stacklevel=2,
            )

        # 3. Unconditional embeddings: SDXL's are zeros.
        null_embeds = None if is_sdxl(unet) else read_empty_text(folder, width)
        return cls(**parts, decoder=decoder, null_embeds=null_embeds).to(device)

    def ratio_size(self, ratio: str) -> tuple[int, int]:
        """Height and width of one of `RATIOS` in this U-Net's size."""
        side = int(self.unet.config.sample_size) * self.factor
        return ratio_size(ratio, side, self.size_unit)

    def image_size(self, settings: LavitSettings) -> tuple[int, int]:
        if settings.ratio is None or settings.height is not None or settings.width is not None:
            return super().image_size(settings)
        return self.ratio_size(settings.ratio)

    def condition_rows(
        self, embeds: Sequence[Tensor], negatives: Tensor | None, settings: LavitSettings
    ) -> dict[str, Sequence[object]]:
        return {"rows": embeds}

    def prepare(
        self,
        settings: LavitSettings,
        generators: Generators,
        rows: Sequence[Tensor] | Conditions,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        rows: codebook rows of each image, or what the decoder computes from them.
        start: noise; None: of the generators.
        """
        decoded = rows
        if not isinstance(decoded, Conditions):
            assert self.decoder is not None
            decoded = self.decoder(rows)
        size = self.image_size(settings)
        if start is None:
            start = self.initial_latents(generators, size, decoded.features, dtype=torch.float32)

        # 1. Prompt embeddings. With guidance the unconditional rows are in front of them.
        is_guided = settings.guidance_scale > 1
        prompt = decoded.prompt_embeds.to(self.device, self.unet.dtype)  # [B, N, W]
        mask = None
        if is_guided:
            null_prompt, mask = unconditional(prompt, self.null_embeds)
            prompt = torch.cat([null_prompt, prompt])  # [2 B, N, W]
        conditions: DenoiserConditions = {"encoder_hidden_states": prompt}
        if mask is not None:
            conditions["encoder_attention_mask"] = torch.cat([mask, torch.ones_like(mask)])

        # 2. SDXL's further conditions: pooled embeddings, and sizes.
        if is_sdxl(self.unet):
            assert decoded.pooled is not None
            pooled = decoded.pooled.to(prompt)
            if is_guided:
                pooled = torch.cat([torch.zeros_like(pooled), pooled])
            time_ids = size_ids(
                size,
                original=settings.original_size,
                crop=settings.crops_coords_top_left,
                count=len(prompt),
            )
            conditions["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": time_ids.to(self.device),
            }
        guide = guidance(settings.guidance_scale)
        return Denoising(start, conditions, guide)


def is_sdxl(unet: nn.Module) -> bool:
    """Whether a U-Net reads pooled embeddings and sizes, as SDXL's."""
    return unet.config.addition_embed_type == "text_time"


def unconditional(prompt: Tensor, null_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Unconditional prompt embeddings `[B, N, W]` for guidance, and their mask (None: all)."""
    null_prompt = torch.zeros_like(prompt)
    if null_embeds is None:
        return null_prompt, None
    # The empty text, and zeros that are masked.
    length = null_embeds.shape[1]
    null_prompt[:, :length] = null_embeds.to(prompt)
    mask_N = torch.arange(prompt.shape[1], device=prompt.device) < length
    return null_prompt, mask_N.expand(len(prompt), -1)


def read_empty_text(folder: Path, width: int) -> Tensor:
    """The empty text's embeddings `[1, L, width]`, from their file or by SD's text encoder.

    Raises:
        CheckpointError: missing, or of another width.
    """
    if (folder / "text_encoder").is_dir() and not (folder / EMPTY_TEXT).is_file():
        encoder = LavitDetokenizer.load_part(folder, "text_encoder")
        tokenizer = LavitDetokenizer.load_part(folder, "tokenizer")
        with torch.no_grad():
            return empty_prompt(encoder, tokenizer, torch.device("cpu"))
    tensors = load_state_dict(find_file(folder, [EMPTY_TEXT], download_advice("lavit")))
    embeds: Tensor = next(iter(tensors.values()))  # under whatever name
    if embeds.shape[-1] != width:
        raise CheckpointError(
            f"{folder / EMPTY_TEXT}: has width {embeds.shape[-1]}, but the U-Net reads width "
            f"{width}."
        )
    return embeds.float().view(1, -1, width)
