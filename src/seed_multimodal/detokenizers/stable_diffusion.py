"""SEED-1's de-tokenizer: 77 text-like embeddings become a picture by an unchanged Stable Diffusion 1.

    detokenizer = StableDiffusionDetokenizer.from_pretrained("pretrained/stable-diffusion-v1-4")
    pictures = detokenizer.decode(tokenizer.decode(codes), generator=torch.Generator().manual_seed(42))

diffusers' own pipeline with `prompt_embeds`; the unconditional half is the empty prompt. The original took one
embedding per call and its noise from the process; here every picture of a batch has its own generator, and what it
looks like does not depend on the others. At step numbers that divide 1000 (the default 50 does) the folder's sampler is
the original's; `scheduler="plms"` is so for all.
Peculiar: a safety checker in the folder is used, as in the original (a flagged picture is black); there is no
watermark.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.detokenizers.unclip import DecodeDefaults, Generators, _one_each, _part, _scheduler
from seed_multimodal.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

FOLDER = "pretrained/stable-diffusion-v1-4"
WHERE = (f"download the diffusers folder of Stable Diffusion 1.4 (hf download CompVis/stable-diffusion-v1-4 "
         f"--local-dir {FOLDER}, or a mirror of it)")
PLMS = "plms"
CHECKER_PARTS = ("safety_checker", "feature_extractor")


@dataclass(frozen=True)
class StableDiffusionDefaults(DecodeDefaults):
    """What `decode` uses when not told: the original's values, or those in the folder's `seed_decode.json`."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5


class StableDiffusionDetokenizer:
    """Embeddings `[B, n, W]` in the place of a prompt's → PIL pictures, through a `StableDiffusionPipeline`."""

    def __init__(self, pipeline: StableDiffusionPipeline, defaults: DecodeDefaults | None = None) -> None:
        self.pipeline = pipeline
        self.defaults = defaults or StableDiffusionDefaults()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, safety_checker: bool = True) -> StableDiffusionDetokenizer:
        """Load a diffusers folder.

        Args:
            safety_checker: use the folder's checker if it holds one.

        Raises:
            CheckpointError: no such folder (says what to put where), a single checkpoint file, or a folder that is no
                complete Stable Diffusion model.
        """
        place = Path(folder)
        if place.is_file():
            raise CheckpointError(
                f"{place}: a checkpoint in one file (CompVis' format, a pickle that could run code) is not read; "
                f"{WHERE} and give its path, or convert a file you trust once with diffusers "
                f"(StableDiffusionPipeline.from_single_file, then save_pretrained).")
        if not (place / "model_index.json").is_file():
            raise CheckpointError(f"{place}: there is no diffusion model here (no model_index.json): {WHERE}.")
        defaults = StableDiffusionDefaults.read(place)
        pipeline = _load_pipeline(place, dtype, safety_checker)
        for name in ("unet", "vae", "scheduler"):
            if getattr(pipeline, name, None) is None:
                raise CheckpointError(f"{place}: the diffusion folder holds no {name!r}; {WHERE}.")
        return cls(pipeline, defaults).to(device, dtype)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> StableDiffusionDetokenizer:
        """Move every part; returns self."""
        self.pipeline.to(device) if dtype is None else self.pipeline.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.pipeline.unet.device

    @property
    def embedding_dim(self) -> int:
        """Width W of the embeddings this model is conditioned on (768 for Stable Diffusion 1)."""
        return int(self.pipeline.unet.config.cross_attention_dim)

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent (8 for Stable Diffusion)."""
        return int(self.pipeline.vae_scale_factor)

    @torch.no_grad()
    def decode(self, embeds: Tensor, *, negative_embeds: Tensor | None = None,
               num_inference_steps: int | None = None, guidance_scale: float | None = None,
               height: int | None = None, width: int | None = None, eta: float = 0.0,
               generator: Generators = None, latents: Tensor | None = None, scheduler: Any | None = None,
               batch_size: int | None = None, output_type: str = "pil") -> list[Image]:
        """Render embeddings.

        Args:
            embeds: `[B, n, W]`, as `Seed1Tokenizer.decode` gives them (n = 77, W = 768).
            negative_embeds: `[B, n, W]` (or `[1, n, W]`) to steer away from; None for the empty prompt (zeros, if
                the folder has no text encoder).
            num_inference_steps, guidance_scale: None for the folder's defaults (the original's: 50 and 7.5);
                a guidance of 1 or less runs the U-Net once per step.
            height, width: of the pictures in pixels; None for what the model was trained on.
            eta: share of fresh noise in each step, for schedulers that have one (`DDIMScheduler`).
            generator: one for all (picture i is the same in a batch of any size) or one per picture; None is random.
            latents: start `[B, C, h, w]` (or `[1, C, h, w]`), standard normal.
            scheduler: name of a diffusers scheduler class, "plms" for the original's own time steps, or a scheduler;
                None for the folder's.
            batch_size: pictures per forward pass (default: all at once).
            output_type: "pil"; "np", "pt" or "latent" as in diffusers.

        Returns:
            B pictures; for the other output types one array or tensor per picture.

        Raises:
            CheckpointError: embeddings of another width. ConfigError: settings out of range or of another batch.
        """
        embeds = self._check_embeds(embeds, "embeds")
        count = len(embeds)
        if negative_embeds is not None:
            negative_embeds = _for_each(self._check_embeds(negative_embeds, "negative_embeds"), count,
                                        "negative_embeds")
        elif self.pipeline.text_encoder is None or self.pipeline.tokenizer is None:
            negative_embeds = torch.zeros_like(embeds)
        latents = None if latents is None else _for_each(latents, count, "latents")
        generators = _one_each(generator, count)
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        self._check_settings(steps, height, width)
        pictures: list[Any] = []
        with self._using(scheduler or self.defaults.scheduler):
            for start in range(0, count, batch_size or max(count, 1)):
                part = slice(start, start + (batch_size or count))
                own_latents = _part(latents, part)
                pictures.extend(self.pipeline(
                    prompt_embeds=embeds[part], negative_prompt_embeds=_part(negative_embeds, part),
                    num_inference_steps=steps, guidance_scale=guidance, height=height, width=width, eta=eta,
                    generator=_part(generators, part), output_type=output_type,
                    latents=None if own_latents is None else own_latents.to(self.device, self.pipeline.unet.dtype),
                ).images)
        return pictures

    def _check_embeds(self, embeds: Tensor, name: str) -> Tensor:
        if not isinstance(embeds, Tensor) or embeds.ndim != 3 or not embeds.is_floating_point():
            got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ConfigError(f"{name} must be a floating tensor [B, n, {self.embedding_dim}], got {got}.")
        if embeds.shape[2] != self.embedding_dim:
            raise CheckpointError(f"{name} have width {embeds.shape[2]}, but this diffusion model is conditioned on "
                                  f"width {self.embedding_dim}: tokenizer and de-tokenizer do not belong together.")
        return embeds.to(self.device, self.pipeline.unet.dtype)

    def _check_settings(self, steps: int, height: int | None, width: int | None) -> None:
        total = self.pipeline.scheduler.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise ConfigError(f"num_inference_steps must be in 1..{total}, got {steps}.")
        if (height is None) != (width is None):
            raise ConfigError("Give height and width both, or neither.")
        unit = max(8, self.factor)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < unit or value % unit):
                raise ConfigError(f"The {name} must be a multiple of {unit} pixels, got {value}.")

    @contextmanager
    def _using(self, scheduler: Any | None) -> Iterator[None]:
        """Run with another scheduler, built from the present one's noise schedule, and put the old one back."""
        usual = self.pipeline.scheduler
        if scheduler == PLMS:
            from seed_multimodal.detokenizers.plms import PlmsScheduler

            self.pipeline.scheduler = PlmsScheduler.from_sampler(usual.config)
        elif scheduler is not None:
            self.pipeline.scheduler = _scheduler(scheduler, usual) if isinstance(scheduler, str) else scheduler
        try:
            yield
        finally:
            self.pipeline.scheduler = usual


def _load_pipeline(place: Path, dtype: torch.dtype, safety_checker: bool) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError

    shows_progress, loudness = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns about every pipeline without a safety checker
    try:
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        absent = [name for name in ("tokenizer", "text_encoder", "image_encoder", *CHECKER_PARTS)
                  if (index.get(name) or [None])[0] is None]
        if not safety_checker or not (place / "safety_checker").is_dir():
            absent += CHECKER_PARTS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `torch_dtype` is the name every diffusers below 1 knows
            return StableDiffusionPipeline.from_pretrained(
                str(place), torch_dtype=dtype, local_files_only=True,
                requires_safety_checker="safety_checker" not in absent, **dict.fromkeys(absent))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{place}: not a complete Stable Diffusion folder ({reason}); {WHERE}.") from error
    finally:
        logging.set_verbosity(loudness)
        if shows_progress:
            logging.enable_progress_bar()


def _for_each(values: Tensor, count: int, name: str) -> Tensor:
    if len(values) not in (1, count):
        raise ConfigError(f"{name} hold {len(values)} samples for {count} pictures.")
    return values.expand(count, *values.shape[1:])
