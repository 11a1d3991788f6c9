"""GLM-Image's de-tokenizer: codes, texts to write and source images → images.

    image ─► codes, doubled in both directions: one of each patch of 16 pixels ┐
    'words' in quotes ─► ByT5 ────────────────────────────────────────────────┼─► transformer ─► VAE
    source images ─► their codes and latents ─► keys and values of each layer ┘

Equal to diffusers' `GlmImagePipeline`, whose rules are copied: an apostrophe is a quote, and one
padding token precedes each text if their number is even. The denoiser is told times that are not
shifted, while the noise is: by the number of patches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seed_glm_image.processing import DrawingRequest, Source
from seed_glm_image.spec import PIXELS
from seed_multimodal.diffusion.base import Conditions, Denoising, Detokenizer, DrawingSettings
from seed_multimodal.diffusion.conditioner import Generators
from seed_multimodal.diffusion.networks import (
    DenoiserConditions,
    check_class,
    predict,
    scaled_latents,
)
from seed_multimodal.diffusion.objectives import FlowObjective, FlowTimes
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import to_bytes
from seed_multimodal.settings import check_value, positive

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
    from transformers import ByT5Tokenizer, T5EncoderModel

QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")
MAX_GLYPHS = 2048  # tokens of a text
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SHIFT = ("base_image_seq_len", "base_shift", "max_shift")  # its settings of `noise_shift`
SIDE = 1024  # pixels of an image by default


@dataclass(frozen=True)
class GlmImageSettings(DrawingSettings):
    """Defaults of the original."""

    num_inference_steps: int = positive(50, maximum=1000)
    guidance_scale: float = 1.5
    preset: Literal["original"] = "original"


class DrawingInput(NamedTuple):
    """What an image is drawn from: its codes `[h, w]`, and the request."""

    codes: Tensor
    request: DrawingRequest = DrawingRequest()


def quoted(text: str) -> list[str]:
    """The parts of a text in quotes, which the image shows as letters; none: the empty text."""
    return [part for quote in QUOTES for part in re.findall(quote, text)] or [""]


def doubled(codes: Tensor) -> Tensor:
    """Codes `[h, w]` → the code of each patch `[4 h w]`."""
    return codes.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()


def noise_shift(scheduler: SchedulerMixin, n_patches: int) -> float:
    """How far the noise of an image of so many patches is above its time."""
    config = scheduler.config
    root = (n_patches / config.base_image_seq_len) ** 0.5
    shift: float = root * config.max_shift + config.base_shift
    return shift


class GlmImageObjective(FlowObjective):
    """The flow from noise to images, whose noise is shifted, and whose told times are not."""

    def __init__(self, scheduler: SchedulerMixin, patch: int, flow_times: FlowTimes) -> None:
        # Not the base's, which refuses schedulers whose shift depends on the size.
        self.scheduler = scheduler
        self.n_steps = int(scheduler.config.num_train_timesteps)
        self.shift = 1.0
        self.patch = patch  # latents of its side
        self.flow_times = flow_times

    def sample_timesteps(self, count: int, generator: torch.Generator | None) -> Tensor:
        return super().sample_timesteps(count, generator).floor().clamp(min=1)

    def told(self, steps: Tensor) -> Tensor:
        return steps - 1

    def add_noise(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        n_patches = latents[0, 0].numel() // self.patch**2
        shift = noise_shift(self.scheduler, n_patches)
        shifted = self.n_steps * shift / (shift + (self.n_steps / steps - 1))
        return super().add_noise(latents, noise, shifted)


@dataclass(eq=False)
class GlmImageDetokenizer(Detokenizer[GlmImageSettings]):
    """Images of `DrawingInput`s of one `group`; or in training of codes `[B, h, w]` alone."""

    _: KW_ONLY
    t5_encoder: T5EncoderModel | None = None
    byt5_tokenizer: ByT5Tokenizer | None = None

    label = "GLM-Image"
    download_hint = "download its files again (seed fetch glm-image)"
    settings_class = GlmImageSettings
    folders = ("denoiser", "vae", "scheduler", "t5_encoder", "byt5_tokenizer")
    trained = {"transformer": "denoiser"}
    joins_runs = False  # without a text its one is shorter

    def __post_init__(self) -> None:
        super().__post_init__()
        self.patch = int(self.denoiser.config.patch_size)
        if self.patch * self.factor * 2 != PIXELS:
            raise ConfigError(
                f"GLM-Image: patches of {self.patch} latents of {self.factor} pixels are no half "
                f"of a code's {PIXELS} pixels."
            )
        check_class(type(self.scheduler).__name__, [SCHEDULER], f"{self.label}'s scheduler")
        for name in SHIFT:
            check_value(float, self.scheduler.config.get(name), f"{self.label}: {name}", above=0)
        self.size_unit = PIXELS

    @property
    def embedding_dim(self) -> int:
        return 0

    def image_size(self, settings: GlmImageSettings) -> tuple[int, int]:
        height, width = settings.height or SIDE, settings.width or SIDE
        if height % PIXELS or width % PIXELS:
            raise ConfigError(
                f"Height and width must be multiples of {PIXELS} pixels, not {height} and {width}."
            )
        return height, width

    def read(self, embeds: Any) -> tuple[tuple[Sequence[DrawingInput], Tensor], Tensor]:
        """Inputs and the codes of their patches `[B, P]`, for `conditions`."""
        inputs = [row if isinstance(row, DrawingInput) else DrawingInput(row) for row in embeds]
        codes = torch.stack([doubled(row.codes) for row in inputs]).to(self.device)
        return (inputs, codes), codes

    # ---- conditions

    def conditions(
        self,
        embeds: tuple[Sequence[DrawingInput], Tensor],
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: GlmImageSettings,
        generators: Generators,
    ) -> Conditions:
        """See `Detokenizer`; sizes are those of the codes."""
        inputs, codes = embeds
        size = [PIXELS * side for side in inputs[0].codes.shape]
        caches = self.source_caches(inputs[0].request.sources)

        def of(texts: Sequence[str], is_dropped: bool) -> DenoiserConditions:
            glyphs = {text: self.glyphs(text) for text in dict.fromkeys(texts)}
            rows = torch.stack([glyphs[text] for text in texts])
            return self.inputs(rows, codes, size, is_dropped)

        conditions = of([row.request.text for row in inputs], False)
        if caches is not None:
            conditions["kv_caches"] = caches
        return conditions, lambda: of([""] * len(inputs), True)

    def inputs(
        self, glyphs: Tensor, codes: Tensor, size: Sequence[int], is_dropped: bool = False
    ) -> DenoiserConditions:
        """The denoiser's inputs of texts `[B, N, W]` and codes `[B, P]`."""
        sizes = torch.tensor([size] * len(codes), dtype=torch.float32, device=self.device)
        return {
            "encoder_hidden_states": glyphs,
            "prior_token_id": codes,
            "prior_token_drop": torch.full_like(codes, is_dropped, dtype=torch.bool),
            "target_size": sizes,
            "crop_coords": torch.zeros_like(sizes),
        }

    @torch.no_grad()
    def glyphs(self, text: str) -> Tensor:
        """ByT5's states `[N, W]` of the quoted parts of a text."""
        assert self.t5_encoder is not None and self.byt5_tokenizer is not None
        parts = quoted(text)
        ids = self.byt5_tokenizer(parts, max_length=MAX_GLYPHS, truncation=True).input_ids
        pad = self.byt5_tokenizer.pad_token_id
        n_pads = (len(ids) + 1) % 2
        rows = [torch.tensor([pad] * n_pads + row, device=self.device) for row in ids]
        padded = pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        states = self.t5_encoder(padded, attention_mask=mask.float()).last_hidden_state
        return states[mask]

    def source_caches(self, sources: Sequence[Source]) -> GlmImageKVCache | None:
        """Keys and values of source images, read at time 0 without a text."""
        if not sources:
            return None
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        caches = GlmImageKVCache(self.denoiser.config.num_layers)
        caches.set_mode("write")
        width = self.denoiser.config.text_embed_dim
        no_text = torch.zeros(1, 0, width, device=self.device)
        for image, codes in sources:
            pixels = 2 * (to_bytes(image)[None].to(self.device) / 255) - 1
            # Channels last, as from diffusers' image processor: the sums are equal.
            pixels = pixels.clone(memory_format=torch.channels_last)
            latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
            ids = doubled(codes)[None].to(self.device)
            conditions = self.inputs(no_text, ids, pixels.shape[-2:])
            conditions["kv_caches"] = caches
            time = torch.zeros(1, device=self.device)
            predict(self.denoiser, scaled_latents(self.vae, latents), time, conditions)
        caches.set_mode("read")  # by all images of a batch
        return caches

    def group(self, row: DrawingInput) -> object:
        """Equal for images of one batch: they have the same source images, and texts of equal
        lengths, since the denoiser has no mask of padding."""
        assert self.byt5_tokenizer is not None
        texts = self.byt5_tokenizer(quoted(row.request.text)).input_ids
        sources = [
            (image.size, hashlib.blake2b(image.tobytes() + codes.numpy().tobytes()).digest())
            for image, codes in row.request.sources
        ]
        return row.codes.shape, tuple(sources), tuple(map(len, texts))

    # ---- times

    def prepare(self, settings: GlmImageSettings, *arguments: Any) -> Denoising:
        denoising = super().prepare(settings, *arguments)
        denoising.times = self.times(settings)
        # Once, on the device; the denoiser computes it on the CPU in each pass.
        rotary = tuple(part.to(self.device) for part in self.denoiser.rope(denoising.start))
        for conditions in denoising.passes:
            conditions["image_rotary_emb"] = rotary
        return denoising

    def times(self, settings: GlmImageSettings) -> dict[str, Any]:
        """Arguments of the scheduler: told times, and the noise before its shift."""
        height, width = self.image_size(settings)
        n_steps = self.scheduler.config.num_train_timesteps
        times = np.linspace(n_steps, 1.0, settings.num_inference_steps + 1)[:-1]
        times = times.astype(np.int64).astype(np.float32)
        n_patches = height * width // (self.patch * self.factor) ** 2
        shift = noise_shift(self.scheduler, n_patches)
        return {"sigmas": times / n_steps, "timesteps": times - 1, "mu": shift}
