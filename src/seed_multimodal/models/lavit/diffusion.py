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
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.diffusion.base import (
    SAFETY_PARTS,
    Conditions,
    Detokenizer,
    DrawingSettings,
    empty_prompt,
)
from seed_multimodal.diffusion.conditioner import Generators
from seed_multimodal.diffusion.networks import (
    DenoiserConditions,
    conditions_of,
    context_dim,
    is_sdxl,
    size_ids,
)
from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.models.lavit.decoder import CodeDecoder, DecodedCodes
from seed_multimodal.models.lavit.ratios import RATIOS, ratio_size
from seed_multimodal.settings import non_negative, positive, setting
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file, find_folder

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

    num_inference_steps: int = positive(25, maximum=1000)
    guidance_scale: float = 7.0
    ratio: str | None = setting(None, choices=tuple(RATIOS))
    original_size: tuple[int, int] | None = positive(None)
    crops_coords_top_left: tuple[int, int] = non_negative((0, 0))


@dataclass(eq=False)
class LavitDetokenizer(Detokenizer[LavitSettings]):
    """Rows of the codebook of each image, `[n, C]`, → images.

    null_embeds: the empty text's embeddings `[1, L, W]`, for Stable Diffusion 1; None: zeros.
    """

    _: KW_ONLY
    decoder: CodeDecoder | None = None
    null_embeds: Tensor | None = None

    label = "LaVIT pixel decoder"
    download_hint = download_advice("lavit")
    settings_class = LavitSettings
    float32 = ("vae", "safety_checker")
    noise_dtype = torch.float32
    trained = {"unet": "denoiser", "decoder": "decoder"}

    @property
    def embedding_dim(self) -> int:
        assert self.decoder is not None
        return self.decoder.config.code_dim

    @classmethod
    def from_pretrained(  # type: ignore[override]
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
        parts = cls.load_parts(folder, dtype, *cls.folders)
        unet = parts["denoiser"]
        width = context_dim(unet)
        if decoder is not None and decoder.config.context_dim != width:
            raise CheckpointError(
                f"{folder}: its U-Net reads width {width}, but the decoder of codes writes width "
                f"{decoder.config.context_dim}; they do not belong together."
            )

        # 2. The safety checker, from another folder.
        if safety is not None and (Path(safety) / "safety_checker").is_dir():
            for name in SAFETY_PARTS:
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
        side = int(self.denoiser.config.sample_size) * self.factor
        return ratio_size(ratio, side, self.size_unit)

    def image_size(self, settings: LavitSettings) -> tuple[int, int]:
        if settings.ratio is None or settings.height is not None or settings.width is not None:
            return super().image_size(settings)
        return self.ratio_size(settings.ratio)

    def time_ids(self, settings: LavitSettings, count: int) -> Tensor:
        return size_ids(
            self.image_size(settings),
            original=settings.original_size,
            crop=settings.crops_coords_top_left,
            count=count,
        ).to(self.device)

    def read(self, embeds: Sequence[Tensor]) -> tuple[DecodedCodes, Tensor]:
        assert self.decoder is not None
        decoded = self.decoder(embeds)
        return decoded, decoded.features

    def conditions(
        self,
        embeds: DecodedCodes,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: LavitSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; `negatives` are not read."""
        prompt_BNW = embeds.prompt_embeds
        pooled = embeds.pooled
        mask_BN = None
        if self.null_embeds is not None:
            mask_BN = prompt_BNW.new_ones(prompt_BNW.shape[:2], dtype=torch.bool)

        def null() -> DenoiserConditions:
            null_prompt = torch.zeros_like(prompt_BNW)
            null_pooled = None if pooled is None else torch.zeros_like(pooled)
            if self.null_embeds is None:
                return conditions_of(self.denoiser, null_prompt, null_pooled, time_ids)
            # The empty text, and zeros that are masked.
            length = self.null_embeds.shape[1]
            null_prompt[:, :length] = self.null_embeds.to(prompt_BNW)
            null_mask = torch.zeros_like(mask_BN)
            null_mask[:, :length] = True
            return conditions_of(self.denoiser, null_prompt, null_pooled, time_ids, null_mask)

        return conditions_of(self.denoiser, prompt_BNW, pooled, time_ids, mask_BN), null


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
