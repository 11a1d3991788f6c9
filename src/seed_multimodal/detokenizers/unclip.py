"""SEED-2's de-tokenizer: an image embedding becomes a picture by stable-unCLIP diffusion.

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    pictures = detokenizer.decode(tokenizer.decode(codes), generator=torch.Generator().manual_seed(0))

Peculiar: noise level 0 still adds a little noise to the embedding, so a picture is determined by its generator. The
released program re-used one latent tensor per process and decoded one picture at a time; here every picture has its
own generator, and what it looks like does not depend on the others in its batch.
A folder without text encoder (nano) is conditioned by zeros, or by `layout/` tokens read off the embedding.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from seed_multimodal.detokenizers.unclip_pipeline import SeedUnclipPipeline

DEFAULTS_FILE = "seed_decode.json"
WHERE = ("download the Stable Diffusion 2.1 unCLIP folder (stabilityai/stable-diffusion-2-1-unclip or a mirror of it) "
         "and put it at pretrained/stable-diffusion-2-1-unclip")
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class DecodeDefaults:
    """What `decode` uses when not told: the released values, or those in the folder's `seed_decode.json`."""

    num_inference_steps: int = 20
    guidance_scale: float = 10.0
    scheduler: str | None = None

    @classmethod
    def read(cls, folder: Path) -> DecodeDefaults:
        """Defaults of a folder; `ConfigError` for an unreadable file or an unknown setting."""
        file = folder / DEFAULTS_FILE
        if not file.is_file():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            unknown = sorted(set(values) - known)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file}: not a JSON mapping of decode settings ({error}).") from error
        if unknown:
            raise ConfigError(f"{file}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)


class UnclipDetokenizer:
    """Image embeddings `[B, E]` → PIL pictures. `pipeline` is a `SeedUnclipPipeline`, `layout` a `LayoutReadout`."""

    def __init__(self, pipeline: SeedUnclipPipeline, defaults: DecodeDefaults | None = None,
                 layout: Any | None = None) -> None:
        self.pipeline, self.layout = pipeline, layout
        self.defaults = defaults or DecodeDefaults()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> UnclipDetokenizer:
        """Load a diffusers folder; its CLIP image encoder is left on disk (embeddings are given).

        Raises:
            CheckpointError: no such folder (says what to put where), or one that is not a complete unCLIP model.
        """
        place = Path(folder)
        if not (place / "model_index.json").is_file():
            raise CheckpointError(f"{place}: there is no diffusion model here (no model_index.json): {WHERE}.")
        defaults = DecodeDefaults.read(place)
        pipeline = _load_pipeline(place, dtype)
        for name in ("unet", "vae", "scheduler", "image_normalizer", "image_noising_scheduler"):
            if getattr(pipeline, name, None) is None:
                raise CheckpointError(f"{place}: the diffusion folder holds no {name!r}; {WHERE}.")
        layout = None
        if (place / "layout").is_dir():
            from seed_multimodal.detokenizers.layout import LayoutReadout

            layout = LayoutReadout.from_pretrained(place / "layout")
        return cls(pipeline, defaults, layout).to(device, dtype)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> UnclipDetokenizer:
        """Move every part; returns self."""
        self.pipeline.to(device) if dtype is None else self.pipeline.to(device, dtype)
        if self.layout is not None:
            self.layout.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.pipeline.unet.device

    @property
    def embedding_dim(self) -> int:
        """Width E of the image embeddings this model was trained on."""
        return int(self.pipeline.image_normalizer.mean.shape[1])

    @torch.no_grad()
    def decode(self, image_embeds: Tensor, *, negative_image_embeds: Tensor | None = None,
               num_inference_steps: int | None = None, guidance_scale: float | None = None, noise_level: int = 0,
               generator: Generators = None, latents: Tensor | None = None, scheduler: Any | None = None,
               batch_size: int | None = None, output_type: str = "pil") -> list[Image]:
        """Render embeddings.

        Args:
            image_embeds: `[B, E]`, as `Seed2Tokenizer.decode` gives them.
            negative_image_embeds: `[B, E]` (or `[1, E]`) to steer away from, instead of zeros.
            num_inference_steps, guidance_scale: None for the folder's defaults (released: 20 and 10.0);
                a guidance of 1 or less runs the U-Net once per step.
            noise_level: how much noise to add to the embedding, 0 up to the noising schedule's length.
            generator: one for all (picture i is the same in a batch of any size) or one per picture; None is random.
            latents: start `[B, C, h, w]`, standard normal; scaled here by the scheduler's first sigma.
            scheduler: name of a diffusers scheduler class, or a scheduler; None for the folder's.
            batch_size: pictures per forward pass (default: all at once).
            output_type: "pil"; "np", "pt" or "latent" as in diffusers.

        Returns:
            B pictures; for the other output types one array or tensor per picture.

        Raises:
            CheckpointError: embeddings of another width. ConfigError: settings out of range or of another batch.
        """
        image_embeds = self._check_embeds(image_embeds, "image_embeds")
        count = len(image_embeds)
        if negative_image_embeds is not None:
            negative_image_embeds = self._check_embeds(negative_image_embeds, "negative_image_embeds")
            negative_image_embeds = self._check_batch(negative_image_embeds, count, "negative_image_embeds")
        if latents is not None:
            latents = self._check_batch(latents, count, "latents")
        generators = _one_each(generator, count)
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        levels = self.pipeline.image_noising_scheduler.config.num_train_timesteps
        if steps < 1 or not 0 <= noise_level < levels:
            raise ConfigError(f"num_inference_steps must be at least 1 and noise_level in 0..{levels - 1}, "
                              f"got {steps} and {noise_level}.")
        pictures: list[Any] = []
        with self._using(scheduler or self.defaults.scheduler):
            for start in range(0, count, batch_size or max(count, 1)):
                part = slice(start, start + (batch_size or count))
                pictures.extend(self._render(
                    image_embeds[part], _part(negative_image_embeds, part), _part(generators, part),
                    _part(latents, part), steps, guidance, noise_level, output_type))
        return pictures

    def _render(self, embeds: Tensor, negatives: Tensor | None, generators: list[torch.Generator] | None,
                latents: Tensor | None, steps: int, guidance: float, noise_level: int, output_type: str) -> Any:
        pipeline, dtype = self.pipeline, self.pipeline.unet.dtype
        pipeline.scheduler.set_timesteps(steps, device=self.device)
        if latents is not None:
            latents = latents.to(self.device, dtype) * pipeline.scheduler.init_noise_sigma
        elif self.layout is not None:
            latents = self.layout.warm_latents(_for_layout(self.layout, embeds), generators, pipeline.scheduler)
            latents = latents.to(self.device, dtype)
        pipeline.negative_image_embeds = negatives
        try:
            return pipeline(image_embeds=embeds, num_inference_steps=steps, guidance_scale=guidance,
                            noise_level=noise_level, generator=generators, latents=latents, output_type=output_type,
                            **self._text_condition(embeds, guidance > 1.0)).images
        finally:
            pipeline.negative_image_embeds = None

    def _text_condition(self, embeds: Tensor, guided: bool) -> dict[str, Any]:
        """The empty prompt where there is a text encoder; else layout tokens or zeros `[B, n, d]`."""
        pipeline = self.pipeline
        if self.layout is not None:
            tokens = self.layout.prompt_embeds(_for_layout(self.layout, embeds))
            tokens = tokens.to(self.device, pipeline.unet.dtype)
        elif pipeline.text_encoder is None or pipeline.tokenizer is None:
            width = pipeline.unet.config.cross_attention_dim
            tokens = torch.zeros(len(embeds), 1, width, device=self.device, dtype=pipeline.unet.dtype)
        else:
            return {"prompt": [""] * len(embeds)}
        return {"prompt_embeds": tokens, "negative_prompt_embeds": torch.zeros_like(tokens) if guided else None}


    def _check_embeds(self, embeds: Tensor, name: str) -> Tensor:
        if not isinstance(embeds, Tensor) or embeds.ndim != 2 or not embeds.is_floating_point():
            got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ConfigError(f"{name} must be a floating tensor [B, {self.embedding_dim}], got {got}.")
        if embeds.shape[1] != self.embedding_dim:
            raise CheckpointError(f"{name} have width {embeds.shape[1]}, but this diffusion model renders width "
                                  f"{self.embedding_dim}: tokenizer and de-tokenizer do not belong together.")
        return embeds.to(self.device)

    @staticmethod
    def _check_batch(values: Tensor, count: int, name: str) -> Tensor:
        if len(values) not in (1, count):
            raise ConfigError(f"{name} hold {len(values)} samples for {count} pictures.")
        return values.expand(count, *values.shape[1:])

    @contextmanager
    def _using(self, scheduler: Any | None) -> Iterator[None]:
        """Run with another scheduler, built from the present one's noise schedule, and put the old one back."""
        usual = self.pipeline.scheduler
        if scheduler is not None:
            self.pipeline.scheduler = _scheduler(scheduler, usual) if isinstance(scheduler, str) else scheduler
        try:
            yield
        finally:
            self.pipeline.scheduler = usual


def _load_pipeline(place: Path, dtype: torch.dtype) -> SeedUnclipPipeline:
    from diffusers.utils import logging
    from safetensors import SafetensorError

    from seed_multimodal.detokenizers.unclip_pipeline import SeedUnclipPipeline

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        absent = [name for name in ("tokenizer", "text_encoder") if (index.get(name) or [None])[0] is None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `torch_dtype` is the name every diffusers below 1 knows
            return SeedUnclipPipeline.from_pretrained(
                str(place), torch_dtype=dtype, local_files_only=True, image_encoder=None, feature_extractor=None,
                **dict.fromkeys(absent))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{place}: not a complete stable-unCLIP folder ({reason}); {WHERE}.") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def _scheduler(name: str, usual: Any) -> Any:
    import diffusers

    names = [entry for entry in dir(diffusers) if entry.endswith("Scheduler") and entry != "Scheduler"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"Unknown scheduler {name!r}" + (f", did you mean {near[0]!r}?" if near else
                                                           ": give a diffusers scheduler class, e.g. DDIMScheduler."))
    return getattr(diffusers, name).from_config(usual.config)


def _one_each(generator: Generators, count: int) -> list[torch.Generator] | None:
    """One generator per picture: the first is the given one, the others are seeded from a copy of it."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if len(generator) != count:
            raise ConfigError(f"{len(generator)} generators were given for {count} pictures.")
        return list(generator)
    copy = generator.clone_state()
    seeds = [int(torch.randint(2**62, (), generator=copy, device=copy.device)) for _ in range(1, count)]
    return [generator, *(torch.Generator(copy.device).manual_seed(seed) for seed in seeds)][:count]


def _for_layout(layout: Any, embeds: Tensor) -> Tensor:
    """The embeddings in the read-out's own precision, which may be finer than the U-Net's."""
    return embeds.to(next(layout.parameters()).dtype)


def _part(values: Any, part: slice) -> Any:
    return None if values is None else values[part]
