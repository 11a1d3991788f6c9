"""SEED-X's de-tokenizer as a task of the loop: both stages of the SDXL adapter, from pictures and edits.

Stage 1: the resampler and the U-Net's keys and values learn to draw from a frozen tower's embeddings. Stage 2: the
first convolution also reads the latents of a condition picture, the source of an edit or zeros. What the paper says and
what is our choice: `diffusion/training.py`, and the configurations' comments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.training import adapter_losses
from seed_multimodal.disk import replace_text
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.nn.layers import checkpointed
from seed_multimodal.seed_x.adapter import SIZES, SDXLAdapter
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.pixel_decoder.features import DTYPES
from seed_multimodal.training.pixel_decoder.settings import PixelRun
from seed_multimodal.training.pixel_decoder.task import PixelTask
from seed_multimodal.training.seed_x.detokenizer_settings import DetokenizerModel, read_detokenizer_run
from seed_multimodal.training.seed_x.tower_features import TowerFeatures
from seed_multimodal.training.trainer import run_task


class DetokenizerTask(PixelTask):
    """One run in one process."""

    result, kind, parts, frozen = "adapter", SdxlDetokenizer, "U-Net and resampler", "vision tower"
    module: SDXLAdapter

    def __init__(self, run: PixelRun[DetokenizerModel], group: ProcessGroup, device: torch.device) -> None:
        super().__init__(run, group, device)
        self.model = run.model
        self.reads_condition = self.model.stage == 2

    @property
    def folder(self) -> Path:
        """See `PixelTask`."""
        return self.model.sdxl

    @property
    def width(self) -> int:
        """See `PixelTask`."""
        return self.module.resampler.sizes.embedding_dim

    @property
    def title(self) -> str:
        """See `PixelTask`."""
        return f"stage {self.model.stage}"

    def conditions(self) -> FrozenFeatures:
        """The tower's embeddings."""
        model, data = self.model, self.run.data
        tower = QwenVit.from_pretrained(model.tower, config=model.tower_sizes, device=self.device,
                                        dtype=DTYPES[self.settings.precision])
        size = tower.config.image_size
        if size != data.tower_size:
            raise ConfigError(f"data: tower_size is {data.tower_size}, but the tower {model.tower} sees {size} pixels "
                              "a side.")
        made = TowerFeatures(tower, self.device, cache=data.cache or None, tokens=model.tokens)
        with torch.autocast(self.device.type, enabled=False):
            self.empty = made.see(torch.zeros(1, 3, size, size, device=self.device)).float()
        return made

    def build(self) -> SDXLAdapter:
        """See `PixelTask`."""
        adapter = build_adapter(self.model)
        read, made = adapter.resampler.sizes.embedding_dim, self.empty.shape[-1]
        if read != made:
            raise ConfigError(f"model: the resampler reads embeddings of width {read}, but the tower makes {made} "
                              "(resampler.embedding_dim).")
        return adapter

    def losses(self, model: nn.Module, latents: Tensor, features: Mapping[str, Tensor], time_ids: Tensor,
               generator: torch.Generator) -> Mapping[str, Tensor]:
        """See `PixelTask`."""
        adapter: Any = model
        return adapter_losses(adapter, self.schedule, latents, features["seen"].float(), time_ids,
                              dropout=self.model.dropout, empty_features=self.empty,
                              condition_latents=features.get("condition"), generator=generator)

    def save_result(self, module: nn.Module, folder: Path) -> None:
        """For `SDXLAdapter.from_pretrained`."""
        assert isinstance(module, SDXLAdapter)
        module.save_pretrained(folder)

    def about_model(self) -> dict[str, Any]:
        """Stage, and what is trained."""
        model = self.model
        return {"stage": model.stage, "trained": model.trained, "resampler": asdict(model.resampler),
                "start": model.start}

    def about_record(self) -> dict[str, Any]:
        """See `PixelTask`."""
        return {"stage": self.model.stage}

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """As the base's, with the resampler's sizes: a checkpoint that holds frozen weights is an adapter, too."""
        super().save_files(folder, weights)
        replace_text(folder / SIZES, json.dumps(asdict(self.module.resampler.sizes), indent=1) + "\n")


def build_adapter(settings: DetokenizerModel) -> SDXLAdapter:
    """What training begins with, on the CPU, with what is trained switched on.

    Raises:
        CheckpointError: weights that are not there. ConfigError: a first stage that begins with a second one.
    """
    sdxl = find_folder(settings.sdxl, ("unet/*",), SDXL_WHERE)
    adapter = SDXLAdapter.from_pretrained(settings.start, sdxl).train() if settings.start else SDXLAdapter.from_unet(
        SdxlDetokenizer.load_part(sdxl, "unet"), settings.resampler, settings.seed)
    if settings.stage == 2:
        adapter.add_condition_channels()
    elif adapter.reads_condition:
        raise ConfigError(f"model: {settings.start} is of the second stage; train it with stage=2.")
    adapter.set_trainable(settings.trained)
    if settings.gradient_checkpointing:
        adapter.unet.enable_gradient_checkpointing(checkpointed)
    return adapter


def train_detokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train by a resolved configuration; under torchrun every process calls it.

    Returns:
        The run's record, also `output_dir/summary.json`; the adapter lies in `output_dir/adapter`.

    Raises:
        SeedError, SystemExit: as `run_task`.
    """
    return run_task(read_detokenizer_run(config), DetokenizerTask)
