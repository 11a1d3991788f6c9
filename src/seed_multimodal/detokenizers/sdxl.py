"""SEED-X's de-tokenizer: visual embeddings become a picture by SDXL, for the second stage beside a condition picture.

    detokenizer = SdxlDetokenizer.from_pretrained("pretrained/stable-diffusion-xl-base-1.0",
                                                  "pretrained/seed_detokenizer/second_stage")
    detokenizer.look_at_nothing(tower, 448)
    pictures = detokenizer.decode(features, conditions=[source], generator=torch.Generator().manual_seed(42))

diffusers' own SDXL pipeline, or that of `sdxl_edit.py` for the second stage, with the adapter's prompt embeddings.
Guidance steers away from what the tower sees in pixels of zero, CLIP's mean colour. The autoencoder computes in float32
whatever the U-Net's precision: SDXL's overflows in float16. There is no watermark.

Note: an MLLM gives 64 embeddings of a picture, the tower 256; the adapters take either. The paper's 64 of a picture
are `pooled_tokens(features, 64)`, while the released reconstruction scripts gave all 256, which keep more of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.detokenizers.autoencoder import autoencoder_folder, pixels_of, read_autoencoder
from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.detokenizers.pipelines import DecodeDefaults, Generators, PipelineDetokenizer
from seed_multimodal.detokenizers.schedulers import read_scheduler
from seed_multimodal.detokenizers.sdxl_adapter import SDXLAdapter
from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes
from seed_multimodal.device import free_memory
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import SDXL_WHERE, find_folder
from seed_multimodal.images.transforms import resize_passes, to_bytes
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import check_value, setting

LAYOUT = "layout"  # folder beside an adapter's weights
NEEDED = ("unet/config.json", "vae/*", "scheduler/*")


@dataclass(frozen=True)
class SdxlDefaults(DecodeDefaults):
    """Default settings of `decode`: those of SEED-X's released programs, or the folder's `seed_decode.json`."""

    num_inference_steps: int = setting(50, least=1)
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


class SdxlDetokenizer(PipelineDetokenizer):
    """Embeddings `[B, N, W]` → PIL pictures.

    Attributes:
        adapter: U-Net and resampler; `pipeline` runs its U-Net.
        empty_features: what the tower sees in nothing, `[1, N, W]`: the default of `decode`'s negative embeddings.
        layout: says what sampling starts from, where the adapter's folder holds one (`layout/`, see layout.py): a
            small U-Net never learns where things belong.
        frees_unet: the U-Net leaves for the CPU before the autoencoder works (and `decode` takes one batch).
    """

    kind, where = "SDXL", SDXL_WHERE
    axes, use = "B, N", "is conditioned on"
    defaults_class = SdxlDefaults

    def __init__(self, pipeline: Any, adapter: SDXLAdapter, defaults: SdxlDefaults | None = None,
                 empty_features: Tensor | None = None) -> None:
        super().__init__(pipeline, defaults)
        self.adapter, self.empty_features, self.frees_unet = adapter, empty_features, False
        self.layout: LayoutDecoder | None = None

    @classmethod
    def of(cls, adapter: SDXLAdapter, vae: Any, scheduler: Any, **options: Any) -> SdxlDetokenizer:
        """From its parts; `options` of the constructor."""
        if adapter.reads_condition:
            from seed_multimodal.detokenizers.sdxl_edit import SdxlEditPipeline

            return cls(SdxlEditPipeline.of(adapter.unet, vae, scheduler), adapter, **options)
        from diffusers import StableDiffusionXLPipeline

        return cls(StableDiffusionXLPipeline(
            vae=vae, unet=adapter.unet, scheduler=scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
            tokenizer_2=None, add_watermarker=False), adapter, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, adapter: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, sizes: ResamplerSizes | None = None) -> SdxlDetokenizer:
        """Load SDXL's autoencoder and scheduler, and an adapter of either stage.

        Args:
            folder: SDXL's diffusers folder or hub name; its U-Net's weights and text encoders are not read.
            adapter, sizes: as `SDXLAdapter.from_pretrained`.

        Raises:
            CheckpointError: something is not there (names what to put where), damaged, or of another model.
        """
        place = find_folder(folder, NEEDED, SDXL_WHERE)
        defaults = cls.defaults_class.read(place)
        with cls.reading(place):
            scheduler = read_scheduler(place, SDXL_WHERE)
        vae = read_autoencoder(place, cls)
        with quiet_loading("diffusers"):
            weights = SDXLAdapter.from_pretrained(adapter, place, device=device, dtype=dtype, sizes=sizes)
        if vae.config.latent_channels != weights.latent_channels:
            raise CheckpointError(f"{adapter}: draws latents of {weights.latent_channels} channels, but "
                                  f"{autoencoder_folder(place)} reads {vae.config.latent_channels}.")
        made = cls.of(weights, vae.to(device), scheduler, defaults=defaults)
        if (found := Path(adapter) / LAYOUT).is_dir():
            made.layout = LayoutDecoder.from_pretrained(found).to(device)
        return made

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> SdxlDetokenizer:
        """Move every part; `dtype` is the adapter's alone. Returns self."""
        self.adapter.to(device, dtype)
        self.pipeline.vae.to(device)
        if self.layout is not None:
            self.layout.to(device)
        return self

    @property
    def embedding_dim(self) -> int:
        """Width W of the embeddings that the resampler reads (4096 for the released ones)."""
        return self.adapter.resampler.sizes.embedding_dim

    @property
    def models(self) -> list[nn.Module]:
        """Everything with weights that drawing uses."""
        return [self.adapter, self.pipeline.vae, *([] if self.layout is None else [self.layout])]

    @torch.no_grad()
    def look_at_nothing(self, tower: nn.Module, image_size: int) -> None:
        """Set `empty_features` to what a tower `[B, 3, S, S]` → `[B, N, W]` gives for normalised pixels of zero."""
        like = next(tower.parameters())
        self.empty_features = tower(torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype))

    @torch.no_grad()
    def decode(self, image_embeds: Tensor, *, negative_image_embeds: Tensor | None = None,
               conditions: Sequence[Image.Image | None] | None = None, num_inference_steps: int | None = None,
               guidance_scale: float | None = None, image_guidance_scale: float | None = None,
               height: int | None = None, width: int | None = None, eta: float = 0.0, generator: Generators = None,
               latents: Tensor | None = None, scheduler: Any | None = None, batch_size: int | None = None,
               output_type: str = "pil") -> list[Image.Image]:
        """Render embeddings.

        Args:
            image_embeds: `[B, N, W]`, any N (released: 64 or 256).
            negative_image_embeds: `[B, M, W]` (or `[1, M, W]`) to steer away from, averaged to N if M is a multiple of
                it; None for `empty_features`.
            conditions: second stage only: a picture for each picture drawn, or None for those drawn without; it is
                squashed to the size of the drawing (images/aspect.py keeps or restores its ratio).
            num_inference_steps, guidance_scale, image_guidance_scale: None for the defaults (50, 7.5 and 1.5); the last
                is the second stage's. A guidance of 1 or less runs the U-Net once per step.
            height, width: of the pictures in pixels, multiples of 8; None for what SDXL was trained on (1024).
            eta: share of fresh noise in each step, for schedulers that have one (`DDIMScheduler`).
            generator: one for all (picture i is the same in a batch of any size) or one per picture; None is random.
            latents: start `[B, C, h, w]` (or `[1, C, h, w]`), standard normal.
            scheduler: name of a diffusers scheduler class, or a scheduler; None for the folder's.
            batch_size: pictures per forward pass (default: all at once).
            output_type: "pil"; "np", "pt" or "latent" as in diffusers.

        Returns:
            B pictures; for the other output types one array or tensor per picture.

        Raises:
            CheckpointError: embeddings of another width. ConfigError: settings out of range, of another batch, or a
                condition picture for a first stage; guidance without negative embeddings.
        """
        embeds = self.checked(image_embeds, "image_embeds")
        steps, guidance = self.with_defaults(num_inference_steps, guidance_scale)
        assert isinstance(self.defaults, SdxlDefaults)
        by_image = check_value(float, self.defaults.image_guidance_scale if image_guidance_scale is None
                               else image_guidance_scale, "image_guidance_scale")
        height, width = self.checked_size(height, width)
        eta, made = check_value(float, eta, "eta"), self.made_type(output_type)
        guided = guidance > 1.0 and (by_image >= 1.0 or not self.adapter.reads_condition)
        negatives = self._negatives(negative_image_embeds, embeds) if guided else None
        seen = self._condition_latents(conditions, len(embeds), height, width)

        def render(embeds: Tensor, negatives: Tensor | None, seen: Tensor | None, own: Any,
                   start: Tensor | None) -> Any:
            options = {} if seen is None else {"image": seen, "image_guidance_scale": by_image}
            if start is None and self.layout is not None:
                start = layout_start(self.layout, embeds, own, self.pipeline.scheduler, seen)
            drawn = self.pipeline(
                **self._prompts(embeds, negatives), **options, num_inference_steps=steps, guidance_scale=guidance,
                height=height, width=width, eta=eta, generator=own, output_type="latent",
                latents=None if start is None else start.to(self.device, embeds.dtype)).images
            if self.frees_unet:
                self.adapter.to("cpu")
                free_memory(self.pipeline.vae.device)
            if made == "latent":
                return drawn
            return self.pipeline.image_processor.postprocess(pixels_of(self.pipeline.vae, drawn), output_type=made)

        return self.in_batches(render, (embeds, negatives, seen), generator, latents, scheduler=scheduler,
                               batch_size=batch_size, as_pil=output_type == "pil", size=(height, width))

    def checked(self, embeds: Tensor, name: str, count: int | None = None) -> Tensor:
        """As the base's, in the U-Net's precision; `ConfigError` for no embeddings of a picture, too."""
        embeds = super().checked(embeds, name, count).to(self.pipeline.unet.dtype)
        if not embeds.shape[1]:
            raise ConfigError(f"{name} must hold one embedding of each picture or more, got {list(embeds.shape)}.")
        return embeds

    def _negatives(self, given: Tensor | None, embeds: Tensor) -> Tensor:
        """`[B, N, W]`, or as many as are given where they do not divide."""
        if given is None:
            given = self.empty_features
        if given is None:
            raise ConfigError("Guidance steers away from the embeddings of an empty picture, which are not known here: "
                              "call look_at_nothing(tower, image_size) once, give negative_image_embeds, or set "
                              "guidance_scale to 1.")
        return pooled_tokens(self.checked(given, "negative_image_embeds", len(embeds)), embeds.shape[1])

    def _prompts(self, embeds: Tensor, negatives: Tensor | None) -> dict[str, Tensor]:
        prompt, pooled = self.adapter.resampler(embeds)
        made = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
        if negatives is not None:
            prompt, pooled = self.adapter.resampler(negatives)
            made |= {"negative_prompt_embeds": prompt, "negative_pooled_prompt_embeds": pooled}
        return made

    def _condition_latents(self, conditions: Sequence[Image.Image | None] | None, count: int, height: int,
                           width: int) -> Tensor | None:
        """Of each picture, zeros where there is none: `[B, C, h, w]`; None for a first stage."""
        if not self.adapter.reads_condition:
            if conditions is not None:
                raise ConfigError("This de-tokenizer is of the first stage and reads no condition picture; editing "
                                  "needs the second stage (seed_detokenizer/second_stage).")
            return None
        if conditions is not None and (isinstance(conditions, Image.Image) or len(conditions) != count):
            raise ConfigError(f"conditions must be a list of one picture (or None) for each of {count} pictures.")
        factor = self.factor
        latents = torch.zeros(count, self.adapter.latent_channels, height // factor, width // factor,
                              device=self.device)
        for row, picture in enumerate(conditions or ()):
            if picture is not None and not isinstance(picture, Image.Image):
                raise ConfigError(f"conditions must be PIL pictures or None, not a {type(picture).__name__}.")
            if picture is not None:
                latents[row] = self.encode_picture(picture, height, width)[0]
        return latents

    def encode_picture(self, picture: Image.Image, height: int, width: int) -> Tensor:
        """What the second stage reads of a picture squashed to that size, `[1, C, h, w]` in float32.

        The mode of the autoencoder's distribution, not multiplied by its scaling factor.
        """
        vae = self.pipeline.vae
        pixels = to_bytes(resize_passes(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
        return vae.encode((pixels / 127.5 - 1.0)[None].to(vae.device)).latent_dist.mode()


def pooled_tokens(features: Tensor, count: int) -> Tensor:
    """`[B, N, W]` → `[B, count, W]`: means of neighbours in raster order, as SEED-X pools its tower's 256 to 64.

    As they are if N is no multiple of `count`.
    """
    group, rest = divmod(features.shape[1], count)
    return features if rest or group < 2 else F.avg_pool1d(features.mT, group).mT


def layout_start(layout: LayoutDecoder, embeds: Tensor, generators: Any, scheduler: Any, seen: Tensor | None = None,
                 size: tuple[int, int] | None = None) -> Tensor:
    """Where sampling starts, by the layout that embeddings `[B, N, W]` name, on the layout's device.

    Args:
        seen: latents of the condition pictures; size: height and width of the latents, None for the layout's own.

    Raises:
        ConfigError: the layout decoder was made for another number of embeddings.
    """
    like, count = next(layout.parameters()), layout.sizes["embedding"] // embeds.shape[2]
    told = pooled_tokens(embeds, max(count, 1)).flatten(1)
    if told.shape[1] != layout.sizes["embedding"]:
        raise ConfigError(f"The layout decoder reads {count} embeddings of a picture, not {embeds.shape[1]}.")
    return layout.warm_latents(told.to(like), generators, scheduler, None if seen is None else seen.to(like), size)
