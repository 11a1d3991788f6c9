"""Base of the de-tokenizers: image embeddings → images by diffusers' U-Nets, VAEs and schedulers.

    images = detokenizer(embeds, seeds=[1, 2, 3], num_inference_steps=20)

An image depends on its embeddings and seed, not on the rest of the batch. Latents are float32 between steps.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.layout import LAYOUT, LayoutDecoder
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    SeedWarning,
    first_line,
)
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.weights import missing_weights, refuse_tensors

DEFAULTS, VAE_LINK = "seed_decode.json", "vae.json"
FILES = {  # of parts without weights: one of them must exist
    "scheduler": ("scheduler_config.json",),
    "image_noising_scheduler": ("scheduler_config.json",),
    "tokenizer": ("vocab.json", "tokenizer.json"),
    "feature_extractor": ("preprocessor_config.json",),
}
Generators = Sequence[torch.Generator]
FAST_STEPS = 12  # of DPM-Solver++ 2M: as accurate as 20 of PNDM
CLASSES = {  # of a diffusers folder's sub-folders
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "image_normalizer": ("diffusers.pipelines.stable_diffusion", "StableUnCLIPImageNormalizer"),
    "safety_checker": (
        "diffusers.pipelines.stable_diffusion.safety_checker",
        "StableDiffusionSafetyChecker",
    ),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
OPTIONAL = {
    "text_encoder": "text_encoder",
    "tokenizer": "text_encoder",  # part → the sub-folder that must exist
    "safety_checker": "safety_checker",
    "feature_extractor": "safety_checker",
}


@dataclass(frozen=True)
class DrawingSettings:
    """Defaults may be set by a folder's `seed_decode.json`; guidance up to 1: one run of the U-Net; sizes in pixels;
    `preset`: "original", the folder's scheduler, or "fast", DPM-Solver++ 2M with at most `FAST_STEPS` steps."""

    num_inference_steps: int = setting(20, minimum=1, maximum=1000)
    guidance_scale: float = 10.0
    height: int | None = setting(None, minimum=8, maximum=16_384)
    width: int | None = setting(None, minimum=8, maximum=16_384)
    preset: Literal["original", "fast"] = "original"


class Detokenizer:
    """Base class; subclasses define `denoise`. `label` and `download_hint` (where to get it) are for error messages."""

    label: ClassVar[str]
    download_hint: ClassVar[str]
    settings_class: ClassVar[type[DrawingSettings]] = DrawingSettings
    part_names: ClassVar[tuple[str, ...]] = (
        "text_encoder",
        "layout",
        "unet",
        "vae",
        "safety_checker",
    )  # with weights
    float32: ClassVar[tuple[str, ...]] = ("vae", "safety_checker")  # those that stay in float32
    decode_batch_size: ClassVar[int] = 1  # batch size of the VAE decoder
    denoise: Callable[
        ..., Tensor
    ]  # (settings, generators, **`condition_rows`) → latents [B, C, h, w]
    reads_condition = False
    embedding_dim: int

    def __init__(
        self,
        unet: Any,
        vae: Any,
        scheduler: Any,
        *,
        defaults: DrawingSettings | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        layout: LayoutDecoder | None = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        self.unet, self.vae, self.scheduler, self.layout = unet, vae, scheduler, layout
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.safety_checker, self.feature_extractor = safety_checker, feature_extractor
        self.defaults = defaults or self.settings_class()
        self.device, self._hooks = torch.device(unet.device), list[Any]()
        self.factor = 2 ** (
            len(vae.config.block_out_channels) - 1
        )  # pixels along a side of one latent

    def check_settings(self, **given: Any) -> Any:
        """The defaults, overridden by settings that are not None. Raises ConfigError."""
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen.get("preset") == "fast":
            chosen.setdefault(
                "num_inference_steps", min(self.defaults.num_inference_steps, FAST_STEPS)
            )
        settings = read_settings(
            type(self.defaults), {**vars(self.defaults), **chosen}, "Drawing setting"
        )
        self.image_size(settings)
        return settings

    def image_size(self, settings: Any) -> tuple[int, int]:
        """Height and width of an image."""
        side, unit = int(self.unet.config.sample_size) * self.factor, max(8, self.factor)
        size = settings.height or side, settings.width or side
        if any(value % unit for value in size):
            raise ConfigError(
                f"Height and width must be multiples of {unit} pixels, not {size[0]} and {size[1]}."
            )
        return size

    # ---- drawing

    @torch.no_grad()
    def __call__(
        self,
        embeds: Any,
        *,
        negative_embeds: Tensor | None = None,
        condition_images: Sequence[Image.Image | None] | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate an image for each row of `embeds`; `settings`: fields of `settings_class`; seeds None: random.

        `negative_embeds`: unconditional embeddings for guidance, one for all or one each; `condition_images`: for
        SEED-X's second stage, an image or None each; `batch_size`: images at a time, None: all. Raises ConfigError.
        """
        chosen = self.check_settings(**settings)
        conditions = self.condition_rows(embeds, negative_embeds, chosen)
        if self.reads_condition:
            conditions["images"] = condition_images
        count = len(next(iter(conditions.values())))
        seeds = torch.randint(2**62, (count,)).tolist() if seeds is None else seeds
        images, most = list[Image.Image](), batch_size or max(count, 1)
        for start in range(0, count, most):
            part = slice(start, start + most)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
            rows = {
                name: None if value is None else value[part] for name, value in conditions.items()
            }
            images += self.to_images(self.denoise(chosen, generators, **rows))
        for hook in self._hooks:
            hook.offload()
        return images

    def condition_rows(
        self, embeds: Any, negatives: Tensor | None, settings: Any
    ) -> dict[str, Any]:
        """Arguments of `denoise` with one row for each image, or None (but the first)."""
        if embeds.shape[-1] != self.embedding_dim:
            raise CheckpointError(
                f"The embeddings have width {embeds.shape[-1]}, but this diffusion model needs width "
                f"{self.embedding_dim}: tokenizer and de-tokenizer do not belong together."
            )
        if negatives is not None:
            negatives = negatives.expand(len(embeds), *negatives.shape[1:])
        return {"embeds": embeds, "negatives": negatives}

    def sample(
        self,
        start: Tensor,
        conditions: dict[str, Any],
        guide: Callable[[Tensor], Tensor],
        settings: Any,
        generators: Generators,
        concatenated: Tensor | None = None,
    ) -> Tensor:
        """The denoising loop: noise `[B, C, h, w]` → latents, in float32. `conditions` (arguments of the U-Net) and
        `concatenated` (further channels) have R·B rows for R runs of each image; `guide` combines the predictions."""
        scheduler = self.scheduler
        if settings.preset == "fast":
            from diffusers import (
                DPMSolverMultistepScheduler as DpmSolver,
            )  # "leading" steps would begin too late

            scheduler = DpmSolver.from_config(scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(settings.num_inference_steps, device=self.device)
        runs = len(conditions["encoder_hidden_states"]) // len(start)
        latents = start.to(self.device, torch.float32) * scheduler.init_noise_sigma
        options = (
            {"generator": list(generators)}
            if "generator" in inspect.signature(scheduler.step).parameters
            else {}
        )
        for step in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents.repeat(runs, 1, 1, 1), step)
            noisy = (
                noisy if concatenated is None else torch.cat([noisy, concatenated.to(noisy)], dim=1)
            )
            prediction = self.unet(noisy.to(self.unet.dtype), step, **conditions).sample.float()
            latents = scheduler.step(guide(prediction), step, latents, **options).prev_sample
        return latents

    def initial_latents(
        self,
        generators: Generators,
        size: tuple[int, int],
        embeds: Tensor | None,
        condition: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Initial latents `[B, C, h, w]`: noise by each image's generator, or mixed with a layout's latents."""
        height, width = (side // self.factor for side in size)
        if self.layout is not None and embeds is not None:
            return self.layout.warm_latents(
                embeds.to(self.device), generators, self.scheduler, condition, (height, width)
            )
        shape = (self.vae.config.latent_channels, height, width)
        return torch.stack(
            [
                torch.randn(shape, generator=one, dtype=dtype or self.unet.dtype)
                for one in generators
            ]
        )

    def to_images(self, latents: Tensor) -> list[Image.Image]:
        """Latents as PIL images, black where the safety checker flags them. Raises `GenerationError`: NaN."""
        pixels = self.decode(latents)
        if not bool(torch.isfinite(pixels).all()):
            raise GenerationError(
                "The diffusion model computed NaN or infinity: use bfloat16 or float32."
            )
        array = (pixels.permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype("uint8")
        images, checker = [Image.fromarray(row) for row in array], self.safety_checker
        if checker is None:
            return images
        with torch.autocast(self.device.type, enabled=False), quiet_loading("diffusers"):
            seen = self.feature_extractor(images, return_tensors="pt").pixel_values.to(
                self.device, checker.dtype
            )
            flags = checker(clip_input=seen, images=np.zeros((len(images), 1)))[1]
        if any(flags):
            warnings.warn(
                f"The safety checker made {sum(flags)} of {len(images)} images black.",
                SeedWarning,
                2,
            )
        return [
            Image.new("RGB", image.size) if flag else image
            for image, flag in zip(images, flags, strict=True)
        ]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in 0…1 `[B, 3, H, W]`, in the autoencoder's own precision whatever the caller's autocast."""
        vae = self.vae
        with torch.autocast(self.device.type, enabled=False):
            pixels = torch.cat(
                [
                    vae.decode(
                        (part.to(self.device) / vae.config.scaling_factor).to(vae.dtype)
                    ).sample
                    for part in latents.split(self.decode_batch_size)
                ]
            )
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    # ---- devices

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All parts with weights, in order of use."""
        return {
            name: part
            for name in self.part_names
            if (part := getattr(self, name, None)) is not None
        }

    def to(self, device: str | torch.device) -> Self:
        """Move every part, and end off-loading; returns self."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in self.parts.values():
            part.to(device)
        self.device = torch.device(device)
        return self

    def enable_cpu_offload(self, device: str | torch.device) -> Self:
        """Keep each part on the CPU except during its computation on `device`; returns self."""
        from seed_multimodal.diffusion.offload import OffloadHook

        self.to("cpu").device = torch.device(device)
        previous = None
        for part in self.parts.values():
            previous = OffloadHook(part, self.device, previous)
            self._hooks.append(previous)
        return self

    # ---- loading

    @classmethod
    def load_parts(cls, place: Path, dtype: torch.dtype, *names: str) -> dict[str, Any]:
        """Arguments of the constructor from a diffusion folder: named parts, default settings, layout."""
        parts: dict[str, Any] = {
            name: cls.load_part(place, name, torch.float32 if name in cls.float32 else dtype)
            for name in names
            if (place / OPTIONAL.get(name, "")).is_dir()
        }
        if (file := place / DEFAULTS).is_file():
            parts["defaults"] = read_settings(
                cls.settings_class, read_json_object(file, ConfigError), str(file)
            )
        if (place / LAYOUT).is_dir():
            parts["layout"] = LayoutDecoder.from_pretrained(place / LAYOUT)
        return parts

    @classmethod
    def check_parts(cls, place: Path, *names: str) -> None:
        """Raise CheckpointError if a file of these parts is missing, without loading any."""
        for name in names:
            if not (place / OPTIONAL.get(name, "")).is_dir():
                continue
            folder = vae_folder(place) if name == "vae" else place / name
            missing = _missing_path(folder, name)
            if missing is not None:
                kind = "folder" if missing == folder else "file"
                raise CheckpointError(
                    f"{missing}: no such {kind}, so the {cls.label} folder is not complete; "
                    f"{cls.download_hint}."
                )

    @classmethod
    def load_part(cls, place: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A scheduler or a part of `CLASSES`, networks in eval mode. Raises `CheckpointError`."""
        import diffusers

        if name.endswith("scheduler"):
            config = read_json_object(
                place / name / "scheduler_config.json", CheckpointError, cls.download_hint
            )
            return getattr(diffusers, str(config.get("_class_name"))).from_config(config)
        folder = vae_folder(place) if name == "vae" else place / name
        if not folder.is_dir():  # diffusers would treat it as a hub name
            raise CheckpointError(f"{folder}: no such folder; {cls.download_hint}.")
        module, kind = CLASSES[name]
        part_class = getattr(importlib.import_module(module), kind)
        options = (
            {"torch_dtype": dtype, "output_loading_info": True}
            if issubclass(part_class, nn.Module)
            else {}
        )
        try:
            with quiet_loading("diffusers", "transformers"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                part = part_class.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # noqa: BLE001  (damaged files end in errors of a dozen classes)
            raise CheckpointError(
                f"{place}: not a complete {cls.label} folder ({first_line(error)}); {cls.download_hint}."
            ) from error
        if not options:
            return part
        part, info = part
        refuse_tensors(
            sorted(info["missing_keys"]), (), folder, "missing from the file"
        )  # the libraries only warn
        if name == "unet":
            part.register_to_config(_name_or_path="")  # do not save local paths
        return part.eval()


def guidance(scale: float) -> Callable[[Tensor], Tensor]:
    """Classifier-free guidance of predictions `[2 B, …]`, unconditional ones first; of `[B, …]` up to a scale of 1."""

    def combine(prediction: Tensor) -> Tensor:
        away, toward = prediction.chunk(2)
        return away + scale * (toward - away)

    return combine if scale > 1 else lambda prediction: prediction


def empty_prompt(
    text_encoder: Any, tokenizer: Any, device: torch.device, length: int | None = None
) -> Tensor:
    """A text encoder's embeddings of the empty prompt, `[1, length, W]`; None: the tokenizer's own length. Without a
    tokenizer the prompt is CLIP's: one start, then ends."""
    if tokenizer is None:
        sizes = text_encoder.config
        ends = [sizes.eos_token_id] * ((length or sizes.max_position_embeddings) - 1)
        embedded: Tensor = text_encoder(torch.tensor([[sizes.bos_token_id, *ends]], device=device))[
            0
        ]
        return embedded
    words = tokenizer(
        "",
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(device)
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    hidden: Tensor = text_encoder(
        words.input_ids, attention_mask=words.attention_mask if masked else None
    )[0]
    return hidden


def _missing_path(folder: Path, name: str) -> Path | None:
    """The folder of a part if it does not exist, or the first file that it lacks; None: complete."""
    if not folder.is_dir():
        return folder
    if name in FILES:
        files = [folder / file for file in FILES[name]]
        return None if any(file.is_file() for file in files) else files[0]
    if name in ("text_encoder", "safety_checker"):  # of transformers
        return missing_weights(folder)
    return missing_weights(folder, "diffusion_pytorch_model.safetensors")


def vae_folder(place: Path) -> Path:
    """The autoencoder of a diffusion folder: its own `vae/`, or `{"folder": "../…"}` of its `vae.json`."""
    file = place / VAE_LINK
    if (place / "vae").is_dir() or not file.is_file():
        return place / "vae"
    return (place / str(read_json_object(file).get("folder"))).resolve()
