"""SEED-X's de-tokenizers with the original names and arguments.

config = OmegaConf.load("configs/sdxl_adapter/….yaml")
adapter = hydra.utils.instantiate(config, unet=unet).to("cuda").eval()
adapter.init_pipe(vae, scheduler, visual_encoder, image_transform)
images = adapter.generate(image_embeds=output["img_gen_feat"], num_inference_steps=50)
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.conditioner import Conditioner, load_conditioner
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed_x import adapter
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file, locate_or_same

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

    from seed_multimodal.compat.seed_x import DiscreteModleIdentity
    from seed_multimodal.images.transforms import ImageTransform


@dataclass(frozen=True)
class _ResamplerSizes(adapter.ResamplerXLConfig):
    """The arguments of the original class with its defaults; the YAML files name other sizes."""

    depth: int = 8
    num_queries: int = 8
    embedding_dim: int = 768
    normalize: bool = True


class ResamplerXLV2(adapter.ResamplerXLV2):
    """`src.models.detokenizer.resampler.ResamplerXLV2`."""

    __signature__ = signature(_ResamplerSizes)

    def __init__(self, *args: Any, **sizes: Any) -> None:
        super().__init__(_ResamplerSizes(*args, **sizes))


class SDXLAdapter(adapter.SDXLAdapter):
    """`src.models.detokenizer.adapter_modules.SDXLAdapter`, the first stage."""

    default_seed: ClassVar[int | None] = None
    conditioner: Conditioner | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        unet: UNet2DConditionModel,
        resampler: adapter.ResamplerXLV2,
        pretrained_model_path: str | Path | None = None,
        vit_down: bool = False,
        full_ft: bool = False,
        set_trainable_late: bool = False,
    ) -> Self:
        """The adapter with a checkpoint's weights in SDXL's U-Net and the resampler; None: as they
        are.

        The checkpoint determines whether it is of the second stage, and images of 256 features are
        averaged to as many as a drawing has, so the last three arguments have no effect on drawing.

        Raises:
            CheckpointError: missing, damaged or incomplete weights, or tensors of another size.
        """
        model = cls(unet, resampler)
        if pretrained_model_path is None:
            return model
        path = locate_or_same(pretrained_model_path)
        file = find_file(path, adapter.FILES, download_advice("seed-x"))
        model.load(file)
        # Kept out of the module's parts, because it is no part of the checkpoint.
        model.__dict__["conditioner"] = load_conditioner(file.parent)
        return model

    def init_pipe(
        self,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        visual_encoder: nn.Module,
        image_transform: ImageTransform,
        discrete_model: DiscreteModleIdentity | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        """Set what `generate` needs. The autoencoder computes in float32, because SDXL's overflows
        in float16."""
        self.to(device, dtype)
        detokenizer = SdxlDetokenizer(
            self.unet, vae.float(), scheduler, self.resampler, conditioner=self.conditioner
        ).to(device)
        # Kept out of the module's own parts, so that they are not part of its state dict.
        self.__dict__["pipe"] = detokenizer
        self.__dict__["visual_encoder"] = visual_encoder
        self.image_transform = image_transform
        self.discrete_model = discrete_model
        detokenizer.set_null_embeds(visual_encoder, image_transform.image_size)

    @torch.no_grad()
    def generate(
        self,
        image_pil: Image.Image | None = None,
        image_tensor: Tensor | None = None,
        image_embeds: Tensor | None = None,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 30,
        input_image_size: int = 448,
        **settings: object,
    ) -> list[Image.Image]:
        """Images drawn from one of: an image, its pixels `[B, 3, S, S]`, or features `[B, N, K]`.

        height, width: default: SDXL's own 1024.
        input_image_size: without effect, the transform has the size.

        Raises:
            ConfigError: before `init_pipe`, or not exactly one image.
        """
        if not hasattr(self, "pipe"):
            raise ConfigError(
                "Call init_pipe before generate: it sets the autoencoder and the vision encoder."
            )
        if sum(value is not None for value in (image_pil, image_tensor, image_embeds)) != 1:
            raise ConfigError(
                "generate needs exactly one of image_pil, image_tensor and image_embeds."
            )
        # The features of the image.
        if image_pil is not None:
            image_tensor = self.image_transform(image_pil)[None]
        if image_tensor is not None:
            weight = next(self.visual_encoder.parameters())
            image_embeds = self.visual_encoder(image_tensor.to(weight))  # device and dtype
        assert image_embeds is not None
        if self.discrete_model is not None:
            image_embeds = self.discrete_model.encode_image_embeds(image_embeds)
        # All images of a call have the same seed.
        seed = self.default_seed if seed is None else seed
        return self.pipe(
            image_embeds,
            seeds=None if seed is None else [seed] * len(image_embeds),
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            **settings,
        )


class SDXLAdapterWithLatentImage(SDXLAdapter):
    """`src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage`, the second stage."""

    default_seed = 42

    def generate(
        self,
        *sources: Any,
        latent_image: Image.Image | None = None,  # type: ignore[override]
        **settings: Any,
    ) -> list[Image.Image]:
        """As `SDXLAdapter.generate`, with a condition image."""
        return super().generate(*sources, condition_images=[latent_image], **settings)
