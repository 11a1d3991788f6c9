"""SEED-2's de-tokenizer: an image embedding becomes a picture by stable-unCLIP diffusion.

    detokenizer = UnclipDetokenizer.from_pretrained("pretrained/stable-diffusion-2-1-unclip")
    pictures = detokenizer.decode(tokenizer.decode(codes), generator=torch.Generator().manual_seed(0))

Note: noise level 0 still adds a little noise to the embedding, so a picture is determined by its generator. The
released program re-used one latent tensor per process and decoded one picture at a time; here every picture has its own
generator, so its pixels do not depend on the others in its batch.
A folder without text encoder (nano) is conditioned by zeros, or by `layout/` tokens read off the embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.detokenizers.pipelines import DecodeDefaults, Generators, PipelineDetokenizer
from seed_multimodal.hub import UNCLIP_WHERE
from seed_multimodal.settings import check_value

if TYPE_CHECKING:
    from PIL.Image import Image

    from seed_multimodal.detokenizers.unclip_pipeline import SeedUnclipPipeline


class UnclipDetokenizer(PipelineDetokenizer):
    """Image embeddings `[B, E]` → PIL pictures. `pipeline` is a `SeedUnclipPipeline`, `layout` a `LayoutDecoder`."""

    kind, where = "stable-unCLIP", UNCLIP_WHERE
    axes, use = "B", "renders"
    parts = ("unet", "vae", "scheduler", "image_normalizer", "image_noising_scheduler")

    def __init__(self, pipeline: SeedUnclipPipeline, defaults: DecodeDefaults | None = None,
                 layout: Any | None = None) -> None:
        super().__init__(pipeline, defaults)
        self.layout = layout

    @classmethod
    def pipeline_class(cls) -> Any:
        """stable-unCLIP with negative image embeddings."""
        from seed_multimodal.detokenizers.unclip_pipeline import SeedUnclipPipeline

        return SeedUnclipPipeline

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> UnclipDetokenizer:
        """Load a diffusers folder; its CLIP image encoder is left on disk (embeddings are given).

        Raises:
            CheckpointError: no such folder (names what to put where), or one that is not a complete unCLIP model.
        """
        place = Path(folder)
        made = cls.open_folder(place, dtype, left_out=("image_encoder", "feature_extractor"))
        if (place / "layout").is_dir():
            from seed_multimodal.detokenizers.layout import LayoutDecoder

            made.layout = LayoutDecoder.from_pretrained(place / "layout")
        return made.to(device, dtype)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> UnclipDetokenizer:
        """Move every part; returns self."""
        if self.layout is not None:
            self.layout.to(device)
        return super().to(device, dtype)

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
        image_embeds = self.checked(image_embeds, "image_embeds")
        if negative_image_embeds is not None:
            negative_image_embeds = self.checked(negative_image_embeds, "negative_image_embeds", len(image_embeds))
        steps, guidance = self.with_defaults(num_inference_steps, guidance_scale)
        levels = self.pipeline.image_noising_scheduler.config.num_train_timesteps
        noise_level = check_value(int, noise_level, "noise_level", least=0, most=levels - 1)

        made = self.made_type(output_type)

        def render(embeds: Tensor, negatives: Tensor | None, own: Any, start: Tensor | None) -> Any:
            return self._render(embeds, negatives, own, start, steps, guidance, noise_level, made)

        return self.in_batches(render, (image_embeds, negative_image_embeds), generator, latents,
                               scheduler=scheduler, batch_size=batch_size, as_pil=output_type == "pil")

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
        elif not self.has_text:
            width = pipeline.unet.config.cross_attention_dim
            tokens = torch.zeros(len(embeds), 1, width, device=self.device, dtype=pipeline.unet.dtype)
        else:
            return {"prompt": [""] * len(embeds)}
        return {"prompt_embeds": tokens, "negative_prompt_embeds": torch.zeros_like(tokens) if guided else None}


def _for_layout(layout: Any, embeds: Tensor) -> Tensor:
    """The embeddings in the read-out's own precision, which may be finer than the U-Net's."""
    return embeds.to(next(layout.parameters()).dtype)
