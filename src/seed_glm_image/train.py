"""GLM-Image's trainings: of the language model on codes, and of the decoder by flow matching.

The training by rewards (`train_rl`) is the library's for any family. The original's trainings are
not published; these are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from seed_glm_image.diffusion import GlmImageDetokenizer, GlmImageObjective
from seed_glm_image.modeling import CodeNetwork
from seed_glm_image.processing import GlmImageTokenizer
from seed_glm_image.spec import PIXELS, READ_PIXELS
from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.base import DEFAULTS
from seed_multimodal.diffusion.objectives import Objective
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.training.config import refuse_unread
from seed_multimodal.training.llm.loss import LossWeights
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.pixel_decoder.config import (
    CodesImages,
    CodesPixelModel,
    PixelRunSettings,
)
from seed_multimodal.training.pixel_decoder.task import PixelTask

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class GlmImageTask(LlmTask):
    """Trains the language model on the codes of answers."""

    family = "seed_glm_image"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Only codes are learned, whose ids are the first.
        refuse_unread(self.settings, ["text_weight"], "trainer", "where no text is learned")
        self.loss_weights = LossWeights(0, image=self.settings.image_weight)
        # Samples are made by transformers' `generate`, which would count other positions.
        if self.sample_steps:
            self._log("no samples are written during this training; draw from a checkpoint.")
            self.sample_steps = 0

    @staticmethod
    def load_tokenizer(folder: str | Path) -> GlmImageTokenizer:
        return GlmImageTokenizer.from_pretrained(folder)


@dataclass(kw_only=True)
class GlmImageDecoderModel(CodesPixelModel):
    """Trained and frozen models.

    Attributes:
        diffusion: GLM-Image's folder, of which transformer, autoencoder, scheduler and text encoder
            are read; with `start` not read.
        tokenizer: the folder with the image tokenizer.
        trained: parameters of the transformer.
        dropout: share of images without codes, for guidance.
    """

    tokenizer: Path


@dataclass(kw_only=True)
class GlmImageDecoderRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: GlmImageDecoderModel
    data: CodesImages


class GlmImageDecoderTask(PixelTask):
    """Trains the transformer to draw square images from their codes, without letters or sources."""

    run_type = GlmImageDecoderRunSettings
    model: GlmImageDecoderModel
    result = "decoder"
    detokenizer_class = GlmImageDetokenizer
    frozen_name = "tokenizer"
    fixed_settings = ("trained", "start")
    copied = ("vae", "scheduler", "text_encoder", "tokenizer", DEFAULTS)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.model.teacher:
            raise ConfigError("model.teacher: GLM-Image's decoder cannot be distilled.")
        data = self.run.data
        if data.sizes or data.resolution % PIXELS or data.encoder_size * 2 != data.resolution:
            raise ConfigError(
                f"data: images are squares of a multiple of {PIXELS} pixels, read in half of them: "
                f"resolution 1024 needs encoder_size 512; sizes are not read."
            )

    def conditions(self) -> FrozenFeatures:
        """The images' codes, behind those of their previews."""
        network = CodeNetwork.from_pretrained(
            self.model.tokenizer, self.device, DTYPES[self.settings.precision]
        )
        transform = ImageTransform(self.run.data.encoder_size, interpolation="bicubic")
        return self.codes_of(network, transform)

    def embeds(self, conditions: Tensor) -> Tensor:
        """The codes of the images alone `[B, h, w]`."""
        side = self.run.data.encoder_size // READ_PIXELS
        return conditions[:, -(side**2) :].unflatten(1, (side, side))

    def new_objective(self, scheduler: SchedulerMixin) -> Objective:
        return GlmImageObjective(scheduler, self.patch, self.model.flow_times)

    def new_detokenizer(self, vae: nn.Module, scheduler: SchedulerMixin) -> GlmImageDetokenizer:
        load = GlmImageDetokenizer.load_part
        t5_encoder = load(self.folder, "t5_encoder").requires_grad_(False).to(self.device)
        detokenizer = GlmImageDetokenizer(
            load(self.folder, "denoiser"),
            vae,
            scheduler,
            t5_encoder=t5_encoder,
            byt5_tokenizer=load(self.folder, "byt5_tokenizer"),
        )
        self.patch = detokenizer.patch
        return detokenizer

    def save_trained(self, detokenizer: GlmImageDetokenizer, folder: Path) -> None:
        """For `GlmImageDetokenizer.from_pretrained`."""
        detokenizer.denoiser.save_pretrained(folder / "transformer")
