"""De-tokenizers of SEED-1 (Stable Diffusion 1.4), of SEED-2 (stable-unCLIP), and of both (codes).

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    images = detokenizer(tokenizer.decode(codes), seeds=[0])

SEED-1's embeddings replace a text prompt's; SEED-2's is a CLIP image embedding. Noise level 0 of
unCLIP still adds a little noise to it, so it depends on the seed, too. The original programs
generate one image at a time from one noise tensor; here every image has its own noise. There is no
watermark.

`CodesDetokenizer` reads codes by cross-attention, decoded or as they are, with any denoiser of
`diffusion.networks`; `detokenizer_class` tells which class a folder is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.base import Conditions, Detokenizer, DrawingSettings
from seed_multimodal.diffusion.conditioner import Generators, seeded_noise
from seed_multimodal.diffusion.networks import DenoiserConditions, conditions_of, context_dim
from seed_multimodal.models.seed.code_adapter import CODE_ADAPTER, CodeAdapter, Reads
from seed_multimodal.models.seed.single_file import SUFFIXES, load_single_file
from seed_multimodal.settings import non_negative, positive
from seed_multimodal.weights.catalogue import download_advice

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SD_FOLDER = "pretrained/stable-diffusion-v1-4"
SD_ADVICE = (
    f"put Stable Diffusion 1.4 there: the original's sd-v1-4.ckpt in pretrained/, or its diffusers "
    f"folder (hf download CompVis/stable-diffusion-v1-4 --local-dir {SD_FOLDER}, or a mirror of it)"
)


@dataclass(frozen=True)
class StableDiffusionSettings(DrawingSettings):
    """Defaults of the original SEED-1."""

    num_inference_steps: int = positive(50, maximum=1000)
    guidance_scale: float = 7.5


class StableDiffusionDetokenizer(Detokenizer[StableDiffusionSettings]):
    """SEED-1: embeddings `[B, n, W]` (77 of width 768), in place of a text prompt's, → images."""

    label = "Stable Diffusion"
    download_hint = SD_ADVICE
    settings_class = StableDiffusionSettings
    folders = (*Detokenizer.folders, "text_encoder", "tokenizer")

    @property
    def embedding_dim(self) -> int:
        return context_dim(self.denoiser)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a diffusers folder, or the original's single file, which has no safety checker.

        config: the single file's YAML; None: Stable Diffusion 1's sizes.
        options: of a folder, see `Detokenizer`.
        """
        file = Path(folder)
        if file.suffix in SUFFIXES and file.is_file():
            return cls(**load_single_file(file, dtype, config)).to(device)
        return super().from_pretrained(folder, device=device, dtype=dtype, **options)

    def conditions(
        self,
        embeds: Tensor,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: StableDiffusionSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; without `negatives` the empty prompt is unconditional."""

        def null() -> DenoiserConditions:
            prompt = negatives
            if prompt is None:
                prompt = self.empty_prompt(embeds.shape[1])
            return conditions_of(self.denoiser, prompt.to(embeds).expand_as(embeds))

        return conditions_of(self.denoiser, embeds), null


@dataclass(frozen=True)
class UnclipSettings(DrawingSettings):
    """noise_level: noise that is added to the embedding, in steps of the noising schedule."""

    noise_level: int = non_negative(0, maximum=999)


@dataclass(eq=False)
class UnclipDetokenizer(Detokenizer[UnclipSettings]):
    """SEED-2: image embeddings `[B, E]` → images."""

    image_normalizer: nn.Module
    image_noising_scheduler: SchedulerMixin

    label = "stable-unCLIP"
    download_hint = download_advice("unclip")
    settings_class = UnclipSettings
    folders = (*StableDiffusionDetokenizer.folders, "image_normalizer", "image_noising_scheduler")

    @property
    def embedding_dim(self) -> int:
        return int(self.image_normalizer.mean.shape[1])

    def conditions(
        self,
        embeds: Tensor,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: UnclipSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; without `negatives` labels of zeros are unconditional."""
        labels = self.class_labels(embeds, settings.noise_level, generators)
        if self.conditioner is not None:
            prompt = self.conditioner.tokens(embeds)
        else:  # the empty prompt, without a text encoder zeros
            prompt = self.empty_prompt().expand(len(embeds), -1, -1)

        def null() -> DenoiserConditions:
            null_labels = torch.zeros_like(labels)
            if negatives is not None:
                null_labels = self.class_labels(negatives, 0, generators)
            # Only a conditioner's tokens are conditions.
            null_prompt = prompt if self.conditioner is None else torch.zeros_like(prompt)
            return conditions_of(self.denoiser, null_prompt, null_labels)

        return conditions_of(self.denoiser, prompt, labels), null

    def class_labels(self, embeds: Tensor, level: int, generators: Generators) -> Tensor:
        """The U-Net's class labels `[B, 2 E]`: noisy embeddings and the sinusoid of the level."""
        from diffusers.models.embeddings import get_timestep_embedding

        # 1. Noise is added to normalised embeddings.
        embeds = embeds.to(self.device, self.denoiser.dtype)
        width = embeds.shape[1]
        noise = seeded_noise(generators, (width,), embeds.dtype).to(self.device)
        levels = embeds.new_full((len(embeds),), level, dtype=torch.long)
        mean = self.image_normalizer.mean.to(self.device)
        std = self.image_normalizer.std.to(self.device)
        noisy = self.image_noising_scheduler.add_noise((embeds - mean) / std, noise, levels)
        noisy = noisy * std + mean

        # 2. The level, as a time step.
        sinusoid = get_timestep_embedding(
            levels, width, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([noisy, sinusoid.to(noisy)], dim=1)


@dataclass(frozen=True)
class CodesSettings(DrawingSettings):
    """Our choice."""

    guidance_scale: float = 3.0


@dataclass(eq=False)
class CodesDetokenizer(Detokenizer[CodesSettings]):
    """Embeddings of 32 codes `[B, 32, W]`, one of the image `[B, W]`, or codes `[B, n]` → images.

    code_adapter: says by its `reads` which of them.
    """

    code_adapter: CodeAdapter

    label = "codes decoder"
    download_hint = "train one (docs/how-to/train-a-tokenizer.md)"
    settings_class = CodesSettings
    folders = (*Detokenizer.folders, CODE_ADAPTER)
    trained = {"denoiser": "denoiser", CODE_ADAPTER: CODE_ADAPTER}

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        return self.code_adapter.config.reads

    @property
    def embedding_dim(self) -> int:
        config = self.code_adapter.config
        return config.tokens if self.reads == "ids" else config.width

    def read(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.code_adapter.embed(embeds.to(self.device))
        return rows, rows

    def conditions(
        self,
        embeds: Tensor,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: CodesSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; without `negatives` learned tokens are unconditional."""
        adapter = self.code_adapter
        tokens = adapter(embeds)

        def null() -> DenoiserConditions:
            null_tokens = adapter.null_tokens.expand_as(tokens)
            if negatives is not None:
                null_tokens = adapter(self.read(negatives)[0])
            return conditions_of(self.denoiser, null_tokens, adapter.pool(null_tokens), time_ids)

        return conditions_of(self.denoiser, tokens, adapter.pool(tokens), time_ids), null


def detokenizer_class(folder: str | Path) -> type[UnclipDetokenizer | CodesDetokenizer]:
    """The class for a diffusion folder of SEED-2: by its `code_adapter/`, else unCLIP."""
    has_adapter = (Path(folder) / CODE_ADAPTER).is_dir()
    return CodesDetokenizer if has_adapter else UnclipDetokenizer
