"""De-tokenizers of SEED-1 (Stable Diffusion 1.4), of SEED-2 (stable-unCLIP), and of both (codes).

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    images = detokenizer(tokenizer.decode(codes), seeds=[0])

SEED-1's embeddings replace a text prompt's; SEED-2's is a CLIP image embedding. Noise level 0 of
unCLIP still adds a little noise to it, so it depends on the seed, too. The original programs
generate one image at a time from one noise tensor; here every image has its own noise. There is no
watermark.

`CodesDetokenizer` reads the decoded codes by cross-attention, with any denoiser of
`diffusion.networks`; `detokenizer_class` tells which class a folder is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion import base
from seed_multimodal.diffusion.base import Denoising, Detokenizer, Settings, guidance
from seed_multimodal.diffusion.conditioner import Conditioner, Generators, seeded_noise
from seed_multimodal.diffusion.networks import DenoiserConditions, conditions_of
from seed_multimodal.diffusion.training import size_ids
from seed_multimodal.models.seed.code_adapter import CODE_ADAPTER, CodeAdapter
from seed_multimodal.models.seed.single_file import SUFFIXES, load_single_file
from seed_multimodal.settings import setting
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

SD_FOLDER = "pretrained/stable-diffusion-v1-4"
SD_ADVICE = (
    f"put Stable Diffusion 1.4 there: the original's sd-v1-4.ckpt in pretrained/, or its diffusers "
    f"folder (hf download CompVis/stable-diffusion-v1-4 --local-dir {SD_FOLDER}, or a mirror of it)"
)
SAFETY_PARTS = ("safety_checker", "feature_extractor")


class OptionalParts(TypedDict, Generic[Settings], total=False):
    """Keywords of `Detokenizer`."""

    defaults: Settings | None
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    conditioner: Conditioner | None
    safety_checker: PreTrainedModel | None
    feature_extractor: BaseImageProcessor | None


class SeedDetokenizer(Detokenizer[Settings]):
    """Common loading code."""

    reads_codes = False  # whether it reads an embedding of each code
    float32 = ("safety_checker",)
    decode_batch_size = 8
    folders: tuple[str, ...] = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = True,
    ) -> Self:
        """Load a diffusers folder.

        safety_checker: use the folder's, if it has one; flagged images are black.

        Raises:
            CheckpointError: missing (with download instructions), incomplete, or damaged.
        """
        names = (*cls.folders, *SAFETY_PARTS) if safety_checker else cls.folders
        # All files must exist before the first is loaded.
        path = find_folder(folder, [f"{name}/*" for name in names], cls.download_hint)
        cls.check_parts(path, *names)
        return cls(**cls.load_parts(path, dtype, *names)).to(device)


@dataclass(frozen=True)
class StableDiffusionSettings(base.DrawingSettings):
    """Defaults of the original SEED-1."""

    num_inference_steps: int = setting(50, minimum=1, maximum=1000)
    guidance_scale: float = 7.5


class StableDiffusionDetokenizer(SeedDetokenizer[StableDiffusionSettings]):
    """SEED-1: embeddings `[B, n, W]` (77 of width 768) → images."""

    label = "Stable Diffusion"
    download_hint = SD_ADVICE
    settings_class = StableDiffusionSettings

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        **options: Unpack[OptionalParts[StableDiffusionSettings]],
    ) -> None:
        super().__init__(unet, vae, scheduler, **options)
        self.embedding_dim = int(self.unet.config.cross_attention_dim)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = True,
        config: str | Path | None = None,
    ) -> Self:
        """Load a diffusers folder, or the original's single file, which has no safety checker.

        safety_checker: see `SeedDetokenizer`.
        config: the single file's YAML; None: Stable Diffusion 1's sizes.
        """
        file = Path(folder)
        if file.suffix not in SUFFIXES or not file.is_file():
            return super().from_pretrained(
                folder, device=device, dtype=dtype, safety_checker=safety_checker
            )
        return cls(**load_single_file(file, dtype, config)).to(device)

    def prepare(
        self,
        settings: StableDiffusionSettings,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        embeds: `[B, n, W]`.
        negatives: unconditional embeddings; None: those of the empty prompt.
        start: initial latents; None: noise of the generators.
        """
        # 1. The embeddings take the place of a text prompt; the unconditional run is first.
        prompt = embeds.to(self.device, self.unet.dtype)
        if settings.guidance_scale > 1:
            if negatives is None and self.text_encoder is not None:
                negatives = base.empty_prompt(
                    self.text_encoder, self.tokenizer, self.device, prompt.shape[1]
                )
            if negatives is None:
                negatives = torch.zeros_like(prompt)
            negatives = negatives.to(prompt).expand_as(prompt)
            prompt = torch.cat([negatives, prompt])  # [2 B, n, W]

        # 2. Start and conditions.
        if start is None:
            start = self.initial_latents(generators, self.image_size(settings), embeds)
        conditions: DenoiserConditions = {"encoder_hidden_states": prompt}
        guide = guidance(settings.guidance_scale)
        return Denoising(start, conditions, guide)


@dataclass(frozen=True)
class UnclipSettings(base.DrawingSettings):
    """noise_level: noise that is added to the embedding, in steps of the noising schedule."""

    noise_level: int = setting(0, minimum=0, maximum=999)


class UnclipDetokenizer(SeedDetokenizer[UnclipSettings]):
    """SEED-2: image embeddings `[B, E]` → images."""

    label = "stable-unCLIP"
    download_hint = download_advice("unclip")
    settings_class = UnclipSettings
    folders = (*SeedDetokenizer.folders, "image_normalizer", "image_noising_scheduler")

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        image_normalizer: nn.Module,
        image_noising_scheduler: SchedulerMixin,
        **options: Unpack[OptionalParts[UnclipSettings]],
    ) -> None:
        super().__init__(unet, vae, scheduler, **options)
        self.image_normalizer = image_normalizer
        self.image_noising_scheduler = image_noising_scheduler
        self.embedding_dim = int(image_normalizer.mean.shape[1])

    def prepare(
        self,
        settings: UnclipSettings,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        embeds: `[B, E]`.
        negatives: unconditional embeddings; None: labels of zeros.
        start: initial latents; None: noise of the generators.
        """
        embeds = embeds.to(self.device)
        size = self.image_size(settings)

        # 1. Each generator draws for the conditioner before it draws for the embeddings, and the
        #    initial noise after them, as the stock pipeline.
        if start is None and self.conditioner is not None:
            start = self.initial_latents(generators, size, embeds)
        labels = self.class_labels(embeds, settings.noise_level, generators)
        prompt = self.prompt(embeds)

        # 2. The unconditional run; only a conditioner's tokens are conditions.
        if settings.guidance_scale > 1:
            if negatives is None:
                negative_labels = torch.zeros_like(labels)
            else:
                negative_labels = self.class_labels(negatives, 0, generators)
            negative_prompt = prompt if self.conditioner is None else torch.zeros_like(prompt)
            labels = torch.cat([negative_labels, labels])  # [2 B, 2 E]
            prompt = torch.cat([negative_prompt, prompt])  # [2 B, n, D]

        # 3. Start and conditions.
        if start is None:
            start = self.initial_latents(generators, size, None)
        conditions: DenoiserConditions = {
            "encoder_hidden_states": prompt.to(self.unet.dtype),
            "class_labels": labels,
        }
        guide = guidance(settings.guidance_scale)
        return Denoising(start, conditions, guide)

    def class_labels(self, embeds: Tensor, level: int, generators: Generators) -> Tensor:
        """The U-Net's class labels `[B, 2 E]`: noisy embeddings and the sinusoid of the level."""
        from diffusers.models.embeddings import get_timestep_embedding

        # 1. Noise is added to normalised embeddings.
        embeds = embeds.to(self.device, self.unet.dtype)
        width = embeds.shape[1]
        noise = seeded_noise(generators, (width,), embeds.dtype).to(self.device)
        levels = torch.full((len(embeds),), level, device=self.device)
        normalizer = self.image_normalizer.to(self.device)
        noisy = self.image_noising_scheduler.add_noise(normalizer.scale(embeds), noise, levels)
        noisy = normalizer.unscale(noisy)

        # 2. The level, as a time step.
        sinusoid = get_timestep_embedding(
            levels, width, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([noisy, sinusoid.to(noisy)], dim=1)

    def prompt(self, embeds: Tensor) -> Tensor:
        """Input of the cross-attention `[B, n, D]`.

        The conditioner's tokens; without one the empty prompt, without a text encoder zeros.
        """
        if self.conditioner is not None:
            return self.conditioner.tokens(embeds)
        if self.text_encoder is not None:
            empty = base.empty_prompt(self.text_encoder, self.tokenizer, self.device)
            return empty.expand(len(embeds), *empty.shape[1:])
        return torch.zeros(len(embeds), 1, self.unet.config.cross_attention_dim, device=self.device)


@dataclass(frozen=True)
class CodesSettings(base.DrawingSettings):
    """Our choice."""

    guidance_scale: float = 3.0


class CodesDetokenizer(SeedDetokenizer[CodesSettings]):
    """Embeddings of 32 codes `[B, 32, W]`, or one of the image `[B, W]`, → images.

    reads_codes: which of them, by the folder's `CodeAdapter`.
    """

    label = "codes decoder"
    download_hint = "train one (docs/how-to/train-a-tokenizer.md)"
    settings_class = CodesSettings
    part_names = (CODE_ADAPTER, "denoiser", "vae", "safety_checker")
    folders = ("denoiser", "vae", "scheduler", CODE_ADAPTER)

    def __init__(
        self,
        denoiser: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        code_adapter: CodeAdapter,
        **options: Unpack[OptionalParts[CodesSettings]],
    ) -> None:
        super().__init__(denoiser, vae, scheduler, **options)
        self.code_adapter = code_adapter
        self.reads_codes = code_adapter.config.reads == "codes"
        self.embedding_dim = code_adapter.config.width

    @classmethod
    def load_part(cls, folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
        if name == CODE_ADAPTER:
            return CodeAdapter.from_pretrained(folder / name, dtype=dtype)
        return super().load_part(folder, name, dtype)

    def prepare(
        self,
        settings: CodesSettings,
        generators: Generators,
        embeds: Tensor,
        negatives: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        embeds: `[B, 32, W]` or `[B, W]`.
        negatives: unconditional ones; None: the learned unconditional tokens.
        start: initial latents; None: noise of the generators.
        """
        # 1. Tokens of the cross-attention; the unconditional run is first.
        tokens = self.code_adapter(embeds.to(self.device))
        if settings.guidance_scale > 1:
            negative_tokens = self.code_adapter.null_tokens.expand_as(tokens)
            if negatives is not None:
                negative_tokens = self.code_adapter(negatives.to(self.device))
            tokens = torch.cat([negative_tokens, tokens])  # [2 B, N, D]

        # 2. Start and conditions.
        size = self.image_size(settings)
        if start is None:
            start = self.initial_latents(generators, size, None)
        time_ids = size_ids(size, count=len(tokens)).to(self.device)
        pooled = self.code_adapter.pool(tokens)
        conditions = conditions_of(self.denoiser, tokens, pooled, time_ids)
        guide = guidance(settings.guidance_scale)
        return Denoising(start, conditions, guide)


def detokenizer_class(folder: str | Path) -> type[UnclipDetokenizer | CodesDetokenizer]:
    """The class for a diffusion folder of SEED-2: by its `code_adapter/`, else unCLIP."""
    has_adapter = (Path(folder) / CODE_ADAPTER).is_dir()
    return CodesDetokenizer if has_adapter else UnclipDetokenizer
