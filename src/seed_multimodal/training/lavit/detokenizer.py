"""LaVIT's pixel decoders as a trainer task: a U-Net learns to reconstruct images from their codes.

The frozen tokenizer computes the codes, the frozen blocks of the code decoder features of these; the decoder's heads
are trained with the U-Net. The result is OUTPUT_DIR/pixels, for `LavitDetokenizer.from_pretrained`, with `decoder/`,
for `CodeDecoder.from_pretrained`.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.pairs_dataset import sample_seed
from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.base import vae_folder
from seed_multimodal.diffusion.training import TrainedLayers
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.lavit.diffusion import EMPTY_TEXT, LavitDetokenizer, is_sdxl, read_empty_text
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.lavit.training import LavitPixelLoss, TrainedPixels, decoder_for
from seed_multimodal.nn.layers import checkpointed
from seed_multimodal.settings import setting
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.llm.config import project_path
from seed_multimodal.training.pixel_decoder.task import ImageData, PixelTask
from seed_multimodal.training.run import RunSettings

DECODER = "decoder"  # subfolder of the result
KEPT = (
    "scheduler",
    "layout",
    "seed_decode.json",
)  # copied from the initial folder, with the autoencoder
Mode = Literal["draw", "threshold"]


@dataclass
class LavitPixelModel:
    """Trained and frozen models.

    Attributes:
        diffusion: a diffusers folder: U-Net (without `start`), autoencoder and noise schedule, of SDXL's kind or of
            Stable Diffusion 1's (which needs `uncond_embeddings.bin`, or text encoder and tokenizer to make it).
        tokenizer: the dynamic tokenizer, as `load_dynamic_tokenizer`.
        decoder: the code decoder, as `CodeDecoder.from_pretrained`; a head for the other kind of U-Net is replaced by
            a new one (`seed`).
        start: an earlier result (U-Net and code decoder) to start from; "": those of `diffusion` and `decoder`.
        trained: parameters of the U-Net, `all` or `key_value`; heads are always trained.
        selection, selection_seed: of patches, see `ImageCodes`.
        dropout: see `LavitPixelLoss`.
    """

    diffusion: Path
    tokenizer: Path
    decoder: Path
    start: str = ""
    trained: TrainedLayers = "all"
    selection: Mode = "draw"
    selection_seed: int = setting(0, minimum=0)
    dropout: float = setting(0.1, minimum=0, maximum=1)
    gradient_checkpointing: bool = False
    seed: int = setting(0, minimum=0)

    def __post_init__(self) -> None:
        for name in ("diffusion", "tokenizer", "decoder"):
            setattr(self, name, project_path(getattr(self, name)))
        self.start = str(project_path(self.start)) if self.start else ""


@dataclass
class LavitImages(ImageData):
    """The images of a run; see `ImageData`."""

    encoder_size: int = setting(224, minimum=1)
    encoder_interpolation: ClassVar[str] = "bicubic"


def image_codes(
    tokenizer: DynamicTokenizer, pixels: Tensor, selection: Mode = "draw", seed: int = 0
) -> Tensor:
    """Pixels of the tokenizer's size → codes int32 `[B, N]` in raster order of the patches, -1 behind the last one.

    `selection`: of patches, as of `DynamicTokenizer.select`; determined by the image and `seed`, so that an image
    always has the same codes.
    """
    generators = (
        [
            torch.Generator().manual_seed(sample_seed(seed, 0, zlib.crc32(one.numpy().tobytes())))
            for one in pixels.cpu()
        ]
        if selection == "draw"
        else None
    )
    found = tokenizer.encode(normalise(pixels), mode=selection, generator=generators)
    codes = torch.full(
        (len(found), tokenizer.config.patches), -1, dtype=torch.int32, device=pixels.device
    )
    for row, one in zip(codes, found, strict=True):
        row[: len(one)] = one
    return codes


class LavitPixelTask(PixelTask):
    """One run in one process."""

    result, kind, frozen, diffusion = "pixels", LavitDetokenizer, "tokenizer", "diffusion"
    group_types = {**PixelTask.group_types, "model": LavitPixelModel, "data": LavitImages}
    same = ("trained", "selection", "start")
    module: TrainedPixels

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        super().__init__(run, group, device)
        self.loss = LavitPixelLoss(self.model.dropout)

    def conditions(self) -> FrozenFeatures:
        """The images' codes."""
        model = self.model
        tokenizer = load_dynamic_tokenizer(
            model.tokenizer, device=self.device, dtype=DTYPES[self.settings.precision]
        )
        self.check_side(tokenizer.config.vit.image_size)
        self.codebook = tokenizer.quantize
        return FrozenFeatures(
            tokenizer,
            self.device,
            lambda pixels: image_codes(tokenizer, pixels, model.selection, model.selection_seed),
        )

    def build(self) -> TrainedPixels:
        """U-Net and code decoder."""
        model = self.model
        place = Path(model.start) if model.start else self.folder
        unet = LavitDetokenizer.load_part(place, "unet")
        decoder, new = decoder_for(
            unet, place / DECODER if model.start else model.decoder, model.seed
        )
        self._log(f"{model.decoder} has no head for this U-Net; training a new one." if new else "")
        self.width = decoder.config.context_dim
        null_embeds = (
            None
            if is_sdxl(unet)
            else read_empty_text(self.folder, int(unet.config.cross_attention_dim))
        )
        module = TrainedPixels(unet, decoder, null_embeds).train()
        module.set_trainable(model.trained)
        if model.gradient_checkpointing:
            unet.enable_gradient_checkpointing(checkpointed)
        return module

    def losses(
        self,
        model: nn.Module,
        latents: Tensor,
        features: Mapping[str, Tensor],
        time_ids: Tensor,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]:
        return self.loss(
            model,
            self.schedule,
            latents,
            self.embeds(features["seen"]),
            time_ids,
            generator=generator,
        )

    def embeds(self, seen: Tensor) -> list[Tensor]:
        """Rows of the codebook of each image `[n, C]`."""
        return [self.codebook.lookup(codes[codes >= 0].long()).float() for codes in seen]

    def detokenizer(self, scheduler: Any) -> LavitDetokenizer:
        module = self.module
        return LavitDetokenizer(
            module.unet,
            self.features.moments.model,
            scheduler,
            decoder=module.decoder,
            null_embeds=module.null_embeds,
        )

    def save_result(self, module: TrainedPixels, folder: Path) -> None:
        """For `LavitDetokenizer.from_pretrained`, with the decoder."""
        module.unet.save_pretrained(folder / "unet")
        module.decoder.save_pretrained(folder / DECODER)
        shutil.copytree(vae_folder(self.folder), folder / "vae", dirs_exist_ok=True)
        for name in KEPT:
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, folder / name, dirs_exist_ok=True)
            elif (self.folder / name).is_file():
                shutil.copy2(self.folder / name, folder / name)
        if module.null_embeds is not None:
            torch.save(module.null_embeds.cpu(), folder / EMPTY_TEXT)
