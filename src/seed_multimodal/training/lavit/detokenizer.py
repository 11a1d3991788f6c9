"""LaVIT's pixel decoders as a task of the loop: a U-Net learns to draw pictures from their own codes.

The frozen tokenizer makes a picture's codes and the frozen blocks of the code decoder features of these; the heads
behind them are trained with the U-Net. What the paper says and what is our choice: `lavit/training.py`,
and the configurations' comments. OUTPUT_DIR/pixels is the result, for `LavitDetokenizer.from_pretrained`, and in it
`decoder/`, for `CodeDecoder.from_pretrained`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.base import vae_folder
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import LAVIT_WHERE, find_folder
from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.lavit.diffusion import EMPTY_TEXT, LavitDetokenizer, is_sdxl, read_empty_text
from seed_multimodal.lavit.training import LavitPixelLoss, TrainedPixels, decoder_for
from seed_multimodal.nn.layers import checkpointed
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.lavit.detokenizer_settings import LavitPixelModel, read_lavit_pixel_run
from seed_multimodal.training.lavit.picture_codes import PictureCodes
from seed_multimodal.training.pixel_decoder.features import DTYPES, NEEDED
from seed_multimodal.training.pixel_decoder.settings import PixelRun
from seed_multimodal.training.pixel_decoder.task import PixelTask
from seed_multimodal.training.trainer import run_task

DECODER = "decoder"  # in the result's folder
KEPT = ("scheduler", "layout", "seed_decode.json")  # of the folder that the training began with, beside the autoencoder


class LavitPixelTask(PixelTask):
    """One run in one process."""

    result, kind, parts, frozen = "pixels", LavitDetokenizer, "U-Net and code decoder", "tokenizer"
    module: TrainedPixels

    def __init__(self, run: PixelRun[LavitPixelModel], group: ProcessGroup, device: torch.device) -> None:
        super().__init__(run, group, device)
        self.model = run.model
        self.loss = LavitPixelLoss(self.model.dropout)

    @property
    def folder(self) -> Path:
        """See `PixelTask`."""
        return find_folder(self.model.diffusion, (*NEEDED, "unet/*"), LAVIT_WHERE)

    @property
    def width(self) -> int:
        """See `PixelTask`."""
        return self.module.decoder.config.context_dim

    def conditions(self) -> FrozenFeatures:
        """The pictures' codes."""
        model, data = self.model, self.run.data
        tokenizer = load_dynamic_tokenizer(model.tokenizer, device=self.device,
                                           dtype=DTYPES[self.settings.precision])
        size = tokenizer.config.vit.image_size
        if size != data.tower_size:
            raise ConfigError(f"data: tower_size is {data.tower_size}, but the tokenizer {model.tokenizer} sees "
                              f"{size} pixels a side.")
        self.codebook, self.places = tokenizer.quantize, tokenizer.config.patches  # stay when the tokenizer goes
        return PictureCodes(tokenizer, self.device, model.selection, model.selection_seed, cache=data.cache or None)

    def build(self) -> TrainedPixels:
        """See `PixelTask`."""
        model = self.model
        place = Path(model.start) if model.start else self.folder
        unet = LavitDetokenizer.load_part(place, "unet")
        decoder, new = decoder_for(unet, place / DECODER if model.start else model.decoder, model.seed)
        if new:
            self._log(f"{model.decoder} has no head for this U-Net: a new one is trained.")
        rows, made = self.codebook.dim, decoder.config.code_dim
        if rows != made or self.places != decoder.config.tokens:
            raise ConfigError(f"model: the code decoder reads {decoder.config.tokens} rows of width {made}, but the "
                              f"tokenizer makes up to {self.places} of width {rows}.")
        null_embeds = None if is_sdxl(unet) else read_empty_text(self.folder, int(unet.config.cross_attention_dim))
        module = TrainedPixels(unet, decoder, null_embeds).train()
        module.set_trainable(model.trained)
        if model.gradient_checkpointing:
            unet.enable_gradient_checkpointing(checkpointed)
        return module

    def losses(self, model: nn.Module, latents: Tensor, features: Mapping[str, Tensor], time_ids: Tensor,
               generator: torch.Generator) -> Mapping[str, Tensor]:
        """See `PixelTask`."""
        rows = [self.codebook.lookup(codes[codes >= 0].long()).float() for codes in features["seen"]]
        return self.loss(model, self.schedule, latents, rows, time_ids, generator=generator)

    def save_result(self, module: nn.Module, folder: Path) -> None:
        """For `LavitDetokenizer.from_pretrained`, with the decoder."""
        assert isinstance(module, TrainedPixels)
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

    def about_model(self) -> dict[str, Any]:
        """What is trained, and from which codes. Folders may move: the weights say whether they are others."""
        model = self.model
        return {"trained": model.trained, "selection": model.selection, "start": model.start}


def train_lavit_detokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train by a resolved configuration; under torchrun every process calls it.

    Returns:
        The run's record, also `output_dir/summary.json`; the pixel decoder lies in `output_dir/pixels`.

    Raises:
        SeedError, SystemExit: as `run_task`.
    """
    return run_task(read_lavit_pixel_run(config), LavitPixelTask)
