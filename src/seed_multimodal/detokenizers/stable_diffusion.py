"""SEED-1's de-tokenizer: 77 text-like embeddings become a picture by an unchanged Stable Diffusion 1.

    detokenizer = StableDiffusionDetokenizer.from_pretrained("pretrained/stable-diffusion-v1-4")
    pictures = detokenizer.decode(tokenizer.decode(codes), generator=torch.Generator().manual_seed(42))

diffusers' own pipeline with `prompt_embeds`; the unconditional half is the empty prompt. The original took one
embedding per call and its noise from the process; here every picture of a batch has its own generator, so its pixels do
not depend on the others. At step numbers that divide 1000 (the default 50 does) the folder's sampler is the original's;
`scheduler="plms"` is so for all.
Note: a safety checker in the folder is used, as in the original (a flagged picture is black); there is no
watermark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.detokenizers.pipelines import DecodeDefaults, Generators, PipelineDetokenizer
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_value, setting

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "pretrained/stable-diffusion-v1-4"
WHERE = (f"download the diffusers folder of Stable Diffusion 1.4 (hf download CompVis/stable-diffusion-v1-4 "
         f"--local-dir {FOLDER}, or a mirror of it)")
PLMS = "plms"
CHECKER_PARTS = ("safety_checker", "feature_extractor")


@dataclass(frozen=True)
class StableDiffusionDefaults(DecodeDefaults):
    """Default settings of `decode`: the original's values, or the folder's `seed_decode.json`."""

    num_inference_steps: int = setting(50, least=1)
    guidance_scale: float = 7.5


def plms(config: Mapping[str, Any]) -> Any:
    """The original's sampler, with the noise schedule of another one's `config`."""
    from seed_multimodal.detokenizers.plms import PlmsScheduler

    return PlmsScheduler.from_sampler(config)


class StableDiffusionDetokenizer(PipelineDetokenizer):
    """Embeddings `[B, n, W]` in the place of a prompt's → PIL pictures, through a `StableDiffusionPipeline`."""

    kind, where = "Stable Diffusion", WHERE
    axes, use, negatives = "B, n", "is conditioned on", "negative_embeds"
    optional = ("tokenizer", "text_encoder", "image_encoder", *CHECKER_PARTS)
    defaults_class = StableDiffusionDefaults
    own_schedulers = {PLMS: plms}

    @classmethod
    def pipeline_class(cls) -> Any:
        """diffusers' own."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, safety_checker: bool = True) -> StableDiffusionDetokenizer:
        """Load a diffusers folder.

        Args:
            safety_checker: use the folder's checker if it holds one.

        Raises:
            CheckpointError: no such folder (names what to put where), a single checkpoint file, or a folder that is no
                complete Stable Diffusion model.
        """
        place = Path(folder)
        if place.is_file():
            raise CheckpointError(
                f"{place}: a checkpoint in one file (CompVis' format, a pickle that could run code) is not read; "
                f"{WHERE} and give its path, or convert a file you trust once with diffusers "
                f"(StableDiffusionPipeline.from_single_file, then save_pretrained).")
        checks = safety_checker and (place / "safety_checker").is_dir()
        made = cls.open_folder(place, dtype, () if checks else CHECKER_PARTS, requires_safety_checker=checks)
        if made.pipeline.unet.config.class_embed_type is not None:
            raise CheckpointError(f"{place}: the U-Net needs class embeddings (as unCLIP's), so it is no Stable "
                                  f"Diffusion 1; {WHERE}.")
        return made.to(device, dtype)

    @property
    def embedding_dim(self) -> int:
        """Width W of the embeddings this model is conditioned on (768 for Stable Diffusion 1)."""
        return int(self.pipeline.unet.config.cross_attention_dim)

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
        embeds = self.checked(embeds, "embeds")
        if negative_embeds is not None:
            negative_embeds = self.checked(negative_embeds, "negative_embeds", len(embeds))
        elif not self.has_text:
            negative_embeds = torch.zeros_like(embeds)
        steps, guidance = self.with_defaults(num_inference_steps, guidance_scale)
        height, width = self.checked_size(height, width)
        eta, made = check_value(float, eta, "eta"), self.made_type(output_type)

        def render(embeds: Tensor, negatives: Tensor | None, own: Any, start: Tensor | None) -> Any:
            return self.pipeline(
                prompt_embeds=embeds, negative_prompt_embeds=negatives, num_inference_steps=steps,
                guidance_scale=guidance, height=height, width=width, eta=eta, generator=own, output_type=made,
                latents=None if start is None else start.to(self.device, self.pipeline.unet.dtype)).images

        return self.in_batches(render, (embeds, negative_embeds), generator, latents, scheduler=scheduler,
                               batch_size=batch_size, as_pil=output_type == "pil", size=(height, width))

    def checked(self, embeds: Tensor, name: str, count: int | None = None) -> Tensor:
        """As the base's, in the U-Net's precision."""
        return super().checked(embeds, name, count).to(self.pipeline.unet.dtype)
