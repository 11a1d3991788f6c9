"""SEED-X's de-tokenizer as a trainer task: both stages of the SDXL adapter, from images and edits.

Stage 1: resampler and U-Net's keys and values, conditioned on a frozen vision encoder's embeddings.
Stage 2: the first convolution also reads the latents of a condition image, the source of an edit or
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.conditioner import CONDITIONER_FOLDERS, pooled_tokens
from seed_multimodal.diffusion.training import ConditionDropout, TrainedLayers
from seed_multimodal.disk import replace_json
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed_x.adapter import RESAMPLER_CONFIG, ResamplerXLConfig, SDXLAdapter
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig
from seed_multimodal.settings import non_negative, setting
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.pixel_decoder.config import PixelModel, PixelRunSettings
from seed_multimodal.training.pixel_decoder.task import PixelTask, copy_part
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_folder as find_parts

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(kw_only=True)
class DetokenizerModel(PixelModel):
    """Trained and frozen models.

    Attributes:
        stage: 1: from embeddings; 2: also from a condition image.
        sdxl: SDXL's diffusers folder: U-Net (without `start`), VAE and noise schedule.
        visual_encoder: its weights, as `QwenVit.from_pretrained`.
        visual_encoder_sizes: None: the stored sizes, or the original ones.
        start: an adapter to start from, for stage 2 that of stage 1; "": SDXL's U-Net and a new
            resampler.
        resampler, seed: of a new resampler.
        trained: `key_value` (and the resampler; first stage of the paper) or `all` (original second
            stage).
        tokens: embeddings of an image after pooling, 64 in the paper; 0: no pooling.
    """

    sdxl: Path
    visual_encoder: Path
    stage: Literal[1, 2] = 1
    visual_encoder_sizes: QwenVitConfig | None = None
    resampler: ResamplerXLConfig = setting(factory=ResamplerXLConfig)
    trained: TrainedLayers = "key_value"
    tokens: int = non_negative(64)
    dropout: ConditionDropout = setting(factory=ConditionDropout)

    @property
    def diffusion_folder(self) -> Path:
        return self.sdxl

    @property
    def condition_dropout(self) -> ConditionDropout:
        return self.dropout


@dataclass(kw_only=True)
class DetokenizerRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: DetokenizerModel


class DetokenizerTask(PixelTask):
    """One run in one process."""

    run_type = DetokenizerRunSettings
    model: DetokenizerModel

    result = "adapter"
    detokenizer_class = SdxlDetokenizer
    frozen_name = "vision encoder"
    fixed_settings = ("stage", "trained", "resampler", "start")

    def __init__(
        self, run: DetokenizerRunSettings, group: ProcessGroup, device: torch.device
    ) -> None:
        super().__init__(run, group, device)
        self.reads_condition = self.model.stage == 2

    def conditions(self) -> FrozenFeatures:
        """The vision encoder's embeddings."""
        model = self.model
        encoder = QwenVit.from_pretrained(
            model.visual_encoder,
            config=model.visual_encoder_sizes,
            device=self.device,
            dtype=DTYPES[self.settings.precision],
        )
        side = encoder.config.image_size
        self.check_side(side)

        # Of an image of zeros, for samples without embeddings.
        zeros = torch.zeros(1, 3, side, side, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            self.null_embeds = pooled_features(encoder, zeros, model.tokens).float()

        def embeddings(pixels: Tensor) -> Tensor:
            normalised = encoder.preprocessing.normalise(pixels)
            return pooled_features(encoder, normalised, model.tokens)

        return FrozenFeatures(encoder, self.device, embeddings)

    def new_detokenizer(self, vae: nn.Module, scheduler: SchedulerMixin) -> SdxlDetokenizer:
        adapter = build_adapter(self.model)
        return SdxlDetokenizer(
            adapter.unet, vae, scheduler, adapter.resampler, null_embeds=self.null_embeds
        )

    def load_decoder(self, path: str) -> SdxlDetokenizer:
        return SdxlDetokenizer.from_pretrained(self.folder, path)

    def save_student(self, denoiser: nn.Module, teacher: SdxlDetokenizer, folder: Path) -> None:
        """The adapter."""
        SDXLAdapter(denoiser, teacher.resampler).save_pretrained(folder)
        for name in CONDITIONER_FOLDERS:
            copy_part(Path(self.model.teacher) / name, folder / name)

    def save_trained(self, detokenizer: SdxlDetokenizer, folder: Path) -> None:
        """Write the adapter for `SDXLAdapter.from_pretrained`."""
        SDXLAdapter(detokenizer.denoiser, detokenizer.resampler).save_pretrained(folder)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """With the resampler's sizes: a checkpoint with frozen weights is also an adapter."""
        super().save(folder, weights)
        if self.model.teacher:
            return  # a student's denoiser
        detokenizer = self.module.detokenizer
        assert isinstance(detokenizer, SdxlDetokenizer)
        replace_json(folder / RESAMPLER_CONFIG, asdict(detokenizer.resampler.config))


@torch.no_grad()
def pooled_features(encoder: QwenVit, pixels: Tensor, tokens: int) -> Tensor:
    """Normalized pixels → pooled features `[N, tokens, K]`; `tokens` 0: no pooling.

    Raises:
        ConfigError: not a divisor of the encoder's number of embeddings.
    """
    dtype = next(encoder.parameters()).dtype
    features = encoder(pixels.to(dtype)).to(dtype)
    n_features = features.shape[1]
    if tokens and n_features % tokens:
        raise ConfigError(f"The encoder's {n_features} embeddings cannot be pooled to {tokens}.")
    return pooled_tokens(features, tokens or n_features)


def build_adapter(settings: DetokenizerModel) -> SDXLAdapter:
    """The initial adapter on the CPU, its resampler trained. Raises CheckpointError."""
    sdxl = find_parts(settings.sdxl, ("unet/*",), download_advice("sdxl"))
    if settings.start:
        adapter = SDXLAdapter.from_pretrained(settings.start, sdxl)
    else:
        unet = SdxlDetokenizer.load_part(sdxl, "denoiser")
        adapter = SDXLAdapter.from_unet(unet, settings.resampler, settings.seed)
    if settings.stage == 2:
        adapter.add_condition_channels()
    adapter.resampler.requires_grad_(True)
    return adapter
