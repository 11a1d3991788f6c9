"""LaVIT's pixel decoders as a trainer task: a U-Net learns to reconstruct images from their codes.

The frozen tokenizer computes the codes, the frozen blocks of the code decoder their features; the
decoder's heads are trained with the U-Net. The result is OUTPUT_DIR/pixels, for
`LavitDetokenizer.from_pretrained`, with `decoder/`, for `CodeDecoder.from_pretrained`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.conditioner import CONDITIONER_FOLDERS
from seed_multimodal.diffusion.networks import context_dim, is_sdxl
from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.diffusion import (
    EMPTY_TEXT,
    LavitDetokenizer,
    read_empty_text,
)
from seed_multimodal.models.lavit.modeling import DynamicCodes
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.recipes.lavit.losses import HEADS, decoder_for
from seed_multimodal.settings import non_negative
from seed_multimodal.training.pixel_decoder.config import (
    CodesImages,
    CodesPixelModel,
    PixelRunSettings,
)
from seed_multimodal.training.pixel_decoder.task import NEEDED, PixelTask
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

DECODER = "decoder"  # subfolder of the result
Mode = Literal["draw", "threshold"]


@dataclass(kw_only=True)
class LavitPixelModel(CodesPixelModel):
    """Trained and frozen models.

    Attributes:
        diffusion: a diffusers folder: U-Net, autoencoder and noise schedule, of SDXL's kind or of
            Stable Diffusion 1's (which needs `uncond_embeddings.bin`, or text encoder and tokenizer
            to make it). With `start` or `teacher` not read.
        tokenizer: the dynamic tokenizer, as `load_dynamic_tokenizer`.
        decoder: the code decoder, as `CodeDecoder.from_pretrained`; a head for the other kind of
            U-Net is replaced by a new one (`seed`).
        start: an earlier result to start from, instead of `diffusion` and `decoder`.
        trained: parameters of the U-Net, `all` or `key_value`; heads are always trained.
        selection, selection_seed: of patches, see `DynamicCodes`.
    """

    tokenizer: Path
    decoder: Path
    selection: Mode = "draw"
    selection_seed: int = non_negative(0)


@dataclass(kw_only=True)
class LavitPixelRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: LavitPixelModel
    data: CodesImages


class LavitPixelTask(PixelTask):
    """One run in one process."""

    run_type = LavitPixelRunSettings
    model: LavitPixelModel
    result = "pixels"
    detokenizer_class = LavitDetokenizer
    frozen_name = "tokenizer"
    fixed_settings = ("trained", "selection", "start")
    copied = ("vae", "scheduler", *CONDITIONER_FOLDERS, "seed_decode.json")

    def conditions(self) -> FrozenFeatures:
        """The images' codes."""
        model = self.model
        tokenizer = load_dynamic_tokenizer(
            model.tokenizer, device=self.device, dtype=DTYPES[self.settings.precision]
        )
        self.codebook = tokenizer.quantize  # of `embeds`
        network = DynamicCodes(tokenizer, model.selection, model.selection_seed)
        return self.codes_of(network, tokenizer.transform)

    def new_detokenizer(self, vae: nn.Module, scheduler: SchedulerMixin) -> LavitDetokenizer:
        model = self.model

        # 1. The networks; an earlier result has both.
        unet = LavitDetokenizer.load_part(self.folder, "denoiser")
        decoder_folder = self.folder / DECODER if model.start else model.decoder
        decoder, has_new_head = decoder_for(unet, decoder_folder, model.seed)
        if has_new_head:
            self._log(f"{model.decoder} has no head for this U-Net; training a new one.")
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name.startswith(HEADS))

        # 2. Unconditional embeddings: SDXL's are zeros.
        null_embeds = None
        if not is_sdxl(unet):
            null_embeds = read_empty_text(self.folder, context_dim(unet))
        return LavitDetokenizer(unet, vae, scheduler, decoder=decoder, null_embeds=null_embeds)

    def embeds(self, conditions: Tensor) -> list[Tensor]:
        """Codes `[B, N]` of `DynamicCodes` → rows of the codebook of each image `[n, C]`."""
        # -1 is padding.
        return [self.codebook.lookup(codes[codes >= 0]).float() for codes in conditions]

    def load_decoder(self, path: str) -> LavitDetokenizer:
        """A result of this training, or the original's with the decoder of the settings."""
        folder = find_folder(path, NEEDED, LavitDetokenizer.download_hint)
        decoder_folder = folder / DECODER
        if not decoder_folder.is_dir():
            decoder_folder = self.model.decoder
        decoder = CodeDecoder.from_pretrained(decoder_folder)
        return LavitDetokenizer.from_pretrained(folder, decoder)

    def save_trained(self, detokenizer: LavitDetokenizer, folder: Path) -> None:
        """For `LavitDetokenizer.from_pretrained`, with the decoder."""
        assert detokenizer.decoder is not None
        detokenizer.denoiser.save_pretrained(folder / "unet")
        detokenizer.decoder.save_pretrained(folder / DECODER)
        if detokenizer.null_embeds is not None:
            torch.save(detokenizer.null_embeds.cpu(), folder / EMPTY_TEXT)
