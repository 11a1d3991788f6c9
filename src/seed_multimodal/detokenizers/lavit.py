"""LaVIT's pixel decoders: the conditions that `lavit.decoder` makes of codes become pictures.

    pixels = LavitPixels.from_pretrained("pretrained/LaVIT-7B-v2/highres_pixel_decoding")
    pictures = pixels.draw(decoder(rows), *RATIOS["3:2"], generator=torch.Generator().manual_seed(42))

Two were released. A U-Net of SDXL's kind (`highres_pixel_decoding`) reads prompt and pooled embeddings and is told
sizes; it is steered away from zeros. One of Stable Diffusion 1's kind (`pixel_decoding`) reads prompt embeddings alone;
it is steered away from the empty text's embeddings (`uncond_embeddings.bin`), the rest of that prompt is masked. The
U-Net's configuration tells which one a folder holds. A folder is `unet/`, `vae/` (or `vae.json`, see autoencoder.py)
and `scheduler/`, and may hold `seed_decode.json` (defaults) and `layout/` (see layout.py). The U-Net is told of codes
alone, never of the words of a request.
Note: the autoencoder computes in float32 whatever the U-Net's precision, noise is drawn on the CPU, and each picture
has its own generator, so that its pixels do not depend on the others in its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.detokenizers.autoencoder import pixels_of, read_autoencoder
from seed_multimodal.detokenizers.lavit_unconditional import UNCONDITIONAL, empty_text, is_sdxl, unconditional
from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.detokenizers.pipelines import DecodeDefaults, Generators, PipelineDetokenizer, refuse_unfilled
from seed_multimodal.detokenizers.safety import SafetyChecker
from seed_multimodal.detokenizers.schedulers import read_scheduler
from seed_multimodal.detokenizers.sdxl import LAYOUT, layout_start
from seed_multimodal.detokenizers.sdxl_adapter import size_ids
from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.hub import LAVIT_WHERE, find_folder
from seed_multimodal.images.ratios import RATIOS
from seed_multimodal.lavit.decoder import Conditions
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import check_value, setting

SIDE = 1024  # of the square one
NEEDED = ("unet/*", "vae/*", "vae.json", "scheduler/*", UNCONDITIONAL)


@dataclass(frozen=True)
class LavitDefaults(DecodeDefaults):
    """Default settings of `decode`: those of the released `generate_image`, or the folder's `seed_decode.json`."""

    num_inference_steps: int = setting(25, least=1)
    guidance_scale: float = 7.0


class LavitPixels(PipelineDetokenizer):
    """`Conditions` → PIL pictures.

    Attributes:
        nothing: the empty text's embeddings `[1, L, W]`, of a U-Net of Stable Diffusion's kind; None: zeros.
        layout: says what sampling starts from, where the folder holds one: it reads `Conditions.features`.
        safety: looks at every picture, where it was asked for; those that it recognises are black.
    """

    kind, where = "LaVIT pixel decoder", LAVIT_WHERE
    axes, use = "B, N", "is conditioned on"
    defaults_class = LavitDefaults

    def __init__(self, unet: Any, vae: Any, scheduler: Any, *, nothing: Tensor | None = None,
                 defaults: LavitDefaults | None = None, layout: LayoutDecoder | None = None,
                 safety: SafetyChecker | None = None) -> None:
        from seed_multimodal.detokenizers.lavit_pipeline import LavitPipeline

        _check_unet(unet, vae)
        super().__init__(LavitPipeline(unet, vae, scheduler), defaults)
        self.nothing, self.layout, self.safety = nothing, layout, safety

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, check_safety: bool = False, safety: str | Path | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LavitPixels:
        """Load a diffusion folder. A U-Net in a torch file (`.bin`, as released) is read as tensors only.

        Args:
            check_safety: look at every picture, if there is a safety checker (a warning says so if there is none).
            safety: folder with `safety_checker` and `feature_extractor`; None: `folder`, or `pixel_decoding` beside it
                (the released one is for both decoders).
            dtype: of the U-Net.

        Raises:
            CheckpointError: something is not there (names what to put where), damaged, or does not fit the rest.
        """
        from diffusers import UNet2DConditionModel

        place = find_folder(folder, NEEDED, LAVIT_WHERE)
        defaults = LavitDefaults.read(place)
        with cls.reading(place):
            scheduler = read_scheduler(place, LAVIT_WHERE)
            unet: Any = UNet2DConditionModel.from_pretrained(place, subfolder="unet", torch_dtype=dtype,
                                                             local_files_only=True)
        refuse_unfilled(unet, place / "unet")
        vae = read_autoencoder(place, cls)
        nothing = None if is_sdxl(unet) else empty_text(place, int(unet.config.cross_attention_dim))
        layout = LayoutDecoder.from_pretrained(place / LAYOUT) if (place / LAYOUT).is_dir() else None
        checker = SafetyChecker.find(safety or place, cls) if check_safety else None
        return cls(unet.eval(), vae, scheduler, nothing=nothing, defaults=defaults, layout=layout,
                   safety=checker).to(device, dtype)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LavitPixels:
        """Move every part; `dtype` is the U-Net's alone. Returns self."""
        with quiet_loading("diffusers"):  # it warns about every cast, even to the precision that a part has
            self.pipeline.unet.to(device=device, dtype=dtype or self.pipeline.unet.dtype)
        self.pipeline.vae.to(device)
        for part in (self.layout, self.safety):
            if part is not None:
                part.to(device)
        return self

    @property
    def embedding_dim(self) -> int:
        """Width of the prompt embeddings (released: 2048, or 768 of the kind of Stable Diffusion 1)."""
        return int(self.pipeline.unet.config.cross_attention_dim)

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled embeddings (released: 1280); None: the U-Net reads none."""
        config = self.pipeline.unet.config
        if not is_sdxl(self.pipeline.unet):
            return None
        return int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)

    @property
    def models(self) -> list[nn.Module]:
        """Everything with weights that drawing uses."""
        return [self.pipeline.unet, self.pipeline.vae, *([] if self.layout is None else [self.layout])]

    def ratio_size(self, ratio: str) -> tuple[int, int]:
        """Height and width of one of `RATIOS` in this U-Net's size; `ConfigError` for another name."""
        check_value(str, ratio, "The ratio", choices=tuple(RATIOS))
        side, unit = int(self.pipeline.unet.config.sample_size) * self.factor, max(8, self.factor)
        height, width = (max(unit, round(one * side / SIDE / unit) * unit) for one in RATIOS[ratio])
        return height, width

    def draw(self, conditions: Conditions, height: int | None = None, width: int | None = None,
             **settings: Any) -> list[Image.Image]:
        """As `decode`, which the other de-tokenizers have, too."""
        return self.decode(conditions, height=height, width=width, **settings)

    @torch.no_grad()
    def decode(self, conditions: Conditions, *, num_inference_steps: int | None = None,
               guidance_scale: float | None = None, height: int | None = None, width: int | None = None,
               ratio: str | None = None, original_size: Sequence[int] | None = None,
               crops_coords_top_left: Sequence[int] = (0, 0), generator: Generators = None,
               latents: Tensor | None = None, scheduler: Any | None = None, batch_size: int | None = None,
               output_type: str = "pil", on_step: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        """Render conditions.

        Args:
            conditions: of B pictures, as `CodeDecoder` gives them.
            num_inference_steps, guidance_scale: None for the defaults (25 and 7); a guidance of 1 or less runs the
                U-Net once per step.
            height, width: of the pictures in pixels, multiples of 8; None for what the U-Net was trained on (1024, or
                512 of the kind of Stable Diffusion 1). ratio: one of `RATIOS` instead.
            original_size, crops_coords_top_left: SDXL's other size conditions, (height, width) and (top, left); None
                for the picture's own size.
            generator: one for all (picture i is the same in a batch of any size) or one per picture; None is random.
            latents: start `[B, C, h, w]` (or `[1, C, h, w]`), standard normal.
            scheduler: name of a diffusers scheduler class, or a scheduler; None for the folder's.
            batch_size: pictures per forward pass (default: all at once).
            output_type: "pil"; "np", "pt" or "latent" as in diffusers.
            on_step: called after each step of a forward pass with the number of steps done and of all.

        Returns:
            B pictures; for the other output types one array or tensor per picture.

        Raises:
            CheckpointError: conditions of another decoder. ConfigError: settings out of range or of another batch.
        """
        prompt, pooled = self._checked_conditions(conditions)
        steps, guidance = self.with_defaults(num_inference_steps, guidance_scale)
        size = self._size(height, width, ratio)
        original = None if original_size is None else _pair(original_size, "original_size", 1)
        crop, made = _pair(crops_coords_top_left, "crops_coords_top_left", 0), self.made_type(output_type)
        if on_step is not None and not callable(on_step):
            raise ConfigError("on_step must be something to call with two numbers, or None.")

        def render(prompt: Tensor, pooled: Tensor | None, features: Tensor | None, own: Any, start: Tensor | None
                   ) -> Any:
            start = self._start(features, own, size, len(prompt)) if start is None else start
            nothing, mask = self._unconditional(prompt) if guidance > 1.0 else (None, None)
            ids = size_ids(size, original=original, crop=crop, count=len(prompt)).to(prompt.device)
            drawn = self.pipeline(start, prompt, nothing, mask, pooled, ids, steps=steps, guidance=guidance,
                                  generators=own, on_step=on_step)
            return drawn if made == "latent" else self._pictures(drawn, made)

        told = None if self.layout is None else conditions.features
        return self.in_batches(render, (prompt, pooled, told), generator, latents, scheduler=scheduler,
                               batch_size=batch_size, as_pil=output_type == "pil", size=size)

    def check_settings(self, **settings: Any) -> None:
        """Refuse settings that `decode` would refuse, without drawing: `ConfigError`."""
        pooled = None if self.pooled_dim is None else torch.zeros(0, self.pooled_dim)
        self.decode(Conditions(torch.zeros(0, 1, self.embedding_dim), pooled, torch.zeros(0, 1, 1)), **settings)

    def _checked_conditions(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Prompt and pooled embeddings on the device, in the U-Net's precision."""
        if not isinstance(conditions, Conditions):
            raise ConfigError(f"Conditions of LaVIT's decoder are drawn, not a {type(conditions).__name__}.")
        dtype, width = self.pipeline.unet.dtype, self.pooled_dim
        prompt = self.checked(conditions.prompt_embeds, "prompt_embeds").to(dtype)
        if self.layout is not None and conditions.features is None:
            raise ConfigError("The layout decoder beside this U-Net reads the conditions' features, which are missing.")
        if width is None:
            return prompt, None
        pooled = conditions.pooled
        if pooled is None or pooled.shape != (len(prompt), width):
            got = "none" if pooled is None else list(pooled.shape)
            raise CheckpointError(f"This U-Net reads pooled embeddings [{len(prompt)}, {width}], but there are {got}: "
                                  f"decoder and pixel decoder do not belong together.")
        return prompt, pooled.to(self.device, dtype)

    def _size(self, height: int | None, width: int | None, ratio: str | None) -> tuple[int, int]:
        if ratio is None:
            return self.checked_size(height, width)
        if height is not None or width is not None:
            raise ConfigError("Give a ratio, or height and width, not both.")
        return self.ratio_size(ratio)

    def _start(self, features: Tensor | None, generators: Any, size: tuple[int, int], count: int) -> Tensor:
        """Noise by the pictures' generators, or by the process' on the CPU; with a layout decoder around its layout."""
        height, width = (one // self.factor for one in size)
        if self.layout is not None and features is not None:
            like = next(self.layout.parameters())
            return layout_start(self.layout, features.to(like), generators, self.pipeline.scheduler,
                                size=(height, width))
        shape = (self.pipeline.vae.config.latent_channels, height, width)
        if generators is None:
            return torch.randn(count, *shape)
        return torch.stack([torch.randn(shape, generator=own, device=own.device).cpu() for own in generators])

    def _unconditional(self, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        return unconditional(prompt, self.nothing)

    def _pictures(self, latents: Tensor, made: str) -> Any:
        """Pictures in 0…1; black those that must not be shown."""
        processor = self.pipeline.image_processor
        images = processor.postprocess(pixels_of(self.pipeline.vae, latents), output_type="pt")
        if self.safety is not None:
            flags = torch.tensor(self.safety(processor.numpy_to_pil(processor.pt_to_numpy(images.nan_to_num()))))
            images[flags.to(images.device)] = 0.0
            if hidden := int(flags.sum()):
                warnings.warn(f"The safety checker made {hidden} of {len(images)} pictures black.", SeedWarning,
                              stacklevel=2)
        return images if made == "pt" else processor.pt_to_numpy(images)


def _check_unet(unet: Any, vae: Any) -> None:
    config = unet.config
    if config.class_embed_type is not None or config.addition_embed_type not in (None, "text_time"):
        raise CheckpointError("The U-Net needs other conditions than LaVIT's decoder makes: it is neither of SDXL's "
                              "kind nor of Stable Diffusion 1's.")
    if not isinstance(config.sample_size, int) or config.sample_size < 1:
        raise CheckpointError(f"The U-Net's sample_size, the side of its latents, is {config.sample_size!r:.80}, but "
                              "must be a whole number above 0.")
    if not config.in_channels == config.out_channels == vae.config.latent_channels:
        raise CheckpointError(f"The U-Net draws latents of {config.out_channels} channels from {config.in_channels}, "
                              f"but the autoencoder reads {vae.config.latent_channels}.")


def _pair(values: Sequence[int], name: str, least: int) -> tuple[int, int]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 2:
        raise ConfigError(f"{name} must be two whole numbers, not {values!r:.80}.")
    first, second = (check_value(int, one, name, least=least, most=2**24) for one in values)
    return first, second
