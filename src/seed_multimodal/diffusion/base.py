"""Base of the de-tokenizers: embeddings of images become images by diffusers' U-Nets, autoencoders and schedulers.

    images = detokenizer(embeds, seeds=[1, 2, 3], num_inference_steps=20)

Every image has its own generator, so a drawing depends on its embeddings and its seed, never on the rest of its batch.
Latents stay float32 between the steps, whatever precision the U-Net computes in.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.diffusion.layout import LAYOUT, LayoutDecoder
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError, SeedWarning, first_line
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import check_keys, check_value, nearest, read_settings, setting
from seed_multimodal.weights import refuse_tensors

DEFAULTS, VAE_ELSEWHERE = "seed_decode.json", "vae.json"
Generators = Sequence[torch.Generator]
Callback = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class DrawingSettings:
    """Settings of a drawing; `seed_decode.json` in a diffusion folder changes the defaults.

    A guidance of 1 or less runs the U-Net once per step. `scheduler`: name of a diffusers class that takes over the
    folder's noise schedule.
    """

    num_inference_steps: int = setting(20, least=1)
    guidance_scale: float = 10.0
    scheduler: str | None = None


@dataclass(frozen=True)
class SizedSettings(DrawingSettings):
    """With the size of the images in pixels; by default that of the U-Net's training."""

    height: int | None = setting(None, least=8, most=16_384)
    width: int | None = setting(None, least=8, most=16_384)


class Detokenizer:
    """Base class; a subclass defines `denoise` and a `__call__` that documents its conditions.

    Attributes:
        kind: of folder, in error messages; where: what to download for it.
        part_names: attributes with weights, in the order of use.
        device: where the parts compute.
    """

    kind: ClassVar[str]
    where: ClassVar[str]
    settings_class: ClassVar[type[DrawingSettings]] = DrawingSettings
    part_names: ClassVar[tuple[str, ...]] = ("text_encoder", "layout", "unet", "vae", "safety_checker")
    decode_at_once: ClassVar[int] = 1  # latents in one call of the autoencoder, whose memory grows with their number
    denoise: Callable[..., Tensor]  # (settings, generators, callback=…, **conditions) → latents [B, C, h, w]

    def __init__(self, unet: Any, vae: Any, scheduler: Any, *, defaults: DrawingSettings | None = None,
                 text_encoder: Any = None, tokenizer: Any = None, layout: LayoutDecoder | None = None,
                 safety_checker: Any = None, feature_extractor: Any = None) -> None:
        self.unet, self.vae, self.scheduler, self.layout = unet, vae, scheduler, layout
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.safety_checker, self.feature_extractor = safety_checker, feature_extractor
        self.defaults = defaults or self.settings_class()
        self.device, self._hooks = torch.device(unet.device), list[Any]()

    # ---- settings

    @classmethod
    def read_defaults(cls, place: Path) -> Any:
        """Default settings of a diffusion folder."""
        file = place / DEFAULTS
        return read_settings(cls.settings_class, read_json_object(file, ConfigError), str(file)) if file.is_file() \
            else cls.settings_class()

    @property
    def setting_names(self) -> list[str]:
        """What `__call__` accepts as drawing settings."""
        return [entry.name for entry in fields(self.defaults)]

    def check_settings(self, **given: Any) -> Any:
        """The defaults with the given settings over them (None: the default).

        Raises:
            ConfigError: an unknown name (the nearest is named), or a value out of range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = read_settings(type(self.defaults), {**vars(self.defaults), **chosen}, "Drawing setting")
        check_value(int, settings.num_inference_steps, "num_inference_steps",
                    most=self.scheduler.config.num_train_timesteps)
        if settings.scheduler is not None:
            scheduler_class(settings.scheduler)
        self.size(settings)
        return settings

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent (8 for Stable Diffusion)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def size(self, settings: Any) -> tuple[int, int]:
        """Height and width of an image; `ConfigError` for one alone, or no whole number of latents."""
        side, unit = int(self.unet.config.sample_size) * self.factor, max(8, self.factor)
        height, width = getattr(settings, "height", None), getattr(settings, "width", None)
        if (height is None) != (width is None):
            raise ConfigError("Give height and width both, or neither.")
        for name, value in (("height", height), ("width", width)):
            if value is not None and value % unit:
                raise ConfigError(f"The {name} must be a multiple of {unit} pixels, not {value}.")
        return height or side, width or side

    # ---- drawing

    @torch.no_grad()
    def draw(self, conditions: dict[str, Any], seeds: Sequence[int] | None, batch_size: int | None,
             callback: Callback | None, settings: Any) -> list[Image.Image]:
        """`denoise` and the autoencoder for `batch_size` images at a time (None: all).

        Args:
            conditions: arguments of `denoise`, with one row for each image, or None; the first is never None.
            seeds: one for each image; None: drawn from torch's global generator.
        """
        count = len(next(iter(conditions.values())))
        seeds = torch.randint(2**62, (count,)).tolist() if seeds is None else seeds
        if len(seeds) != count:
            raise ConfigError(f"{count} images need as many seeds, not {len(seeds)}.")
        images: list[Image.Image] = []
        for start in range(0, count, batch_size or max(count, 1)):
            part = slice(start, start + (batch_size or count))
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
            rows = {name: None if value is None else value[part] for name, value in conditions.items()}
            images += self.to_images(self.denoise(settings, generators, callback=callback, **rows))
        for hook in self._hooks:
            hook.offload()
        return images

    def sample(self, start: Tensor, conditions: dict[str, Any], guide: Callable[[Tensor], Tensor], settings: Any,
               generators: Generators, callback: Callback | None = None, concatenated: Tensor | None = None) -> Tensor:
        """The denoising loop: noise `[B, C, h, w]` → latents, in float32.

        Args:
            conditions: the U-Net's arguments, R·B rows for R runs of each image. guide: its R·B predictions → B.
            callback: called after each step. concatenated: `[R·B, …, h, w]`, further input channels.
        """
        scheduler, device = self.scheduler, self.device
        if settings.scheduler is not None:
            scheduler = scheduler_class(settings.scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(settings.num_inference_steps, device=device)
        runs = len(conditions["encoder_hidden_states"]) // len(start)
        latents = start.to(device, torch.float32) * scheduler.init_noise_sigma
        own = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for done, step in enumerate(scheduler.timesteps, start=1):
            noisy = scheduler.scale_model_input(latents.repeat(runs, 1, 1, 1), step)
            noisy = noisy if concatenated is None else torch.cat([noisy, concatenated.to(noisy)], dim=1)
            prediction = self.unet(noisy.to(self.unet.dtype), step, **conditions).sample.float()
            latents = scheduler.step(guide(prediction), step, latents, **own).prev_sample
            if callback is not None:
                callback(done, len(scheduler.timesteps))
        return latents

    def noise(self, generators: Generators, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """What sampling starts from, `[B, C, h, w]`, by each image's generator."""
        shape = (self.vae.config.latent_channels, *(side // self.factor for side in size))
        return torch.stack([torch.randn(shape, generator=one, dtype=dtype or self.unet.dtype) for one in generators])

    def to_images(self, latents: Tensor) -> list[Image.Image]:
        """Latents as PIL images; black those that the safety checker recognises.

        Raises:
            GenerationError: NaN or infinity.
        """
        pixels = self.decode(latents)
        if not bool(torch.isfinite(pixels).all()):
            raise GenerationError("The diffusion model computed NaN or infinity: its weights are damaged, or float16 "
                                  "is too narrow for them (use bfloat16 or float32).")
        array = (pixels.permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype("uint8")
        images = [Image.fromarray(row) for row in array]
        return images if self.safety_checker is None else self._without_unsafe(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in 0…1 `[B, 3, H, W]`, in the autoencoder's own precision whatever the caller's autocast."""
        vae = self.vae
        with torch.autocast(self.device.type, enabled=False):
            pixels = torch.cat([vae.decode((part.to(self.device) / vae.config.scaling_factor).to(vae.dtype)).sample
                                for part in latents.split(self.decode_at_once)])
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    def _without_unsafe(self, images: list[Image.Image]) -> list[Image.Image]:
        """Flagged images black. The checker computes in its own precision, also under autocast."""
        checker = self.safety_checker
        pixels = self.feature_extractor(images, return_tensors="pt").pixel_values.to(self.device, checker.dtype)
        with torch.autocast(self.device.type, enabled=False), quiet_loading("diffusers"):
            flags = checker(clip_input=pixels, images=np.zeros((len(images), 1)))[1]
        if any(flags):
            warnings.warn(f"The safety checker made {sum(flags)} of {len(images)} images black.", SeedWarning,
                          stacklevel=2)
        return [Image.new("RGB", image.size) if flag else image for image, flag in zip(images, flags, strict=True)]

    # ---- devices

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Everything with weights that drawing uses, in the order of use."""
        return {name: part for name in self.part_names if (part := getattr(self, name, None)) is not None}

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
        """Keep each part on the CPU except while it computes on `device` (accelerate's hooks); returns self."""
        from accelerate import cpu_offload_with_hook

        self.to("cpu").device = torch.device(device)
        for part in self.parts.values():
            self._hooks.append(cpu_offload_with_hook(part, device, self._hooks[-1] if self._hooks else None)[1])
        return self

    # ---- loading

    @classmethod
    @contextlib.contextmanager
    def reading(cls, place: Path) -> Iterator[None]:
        """Inside, diffusers and transformers load in silence; what they raise becomes a `CheckpointError`."""
        from safetensors import SafetensorError

        try:
            with quiet_loading("diffusers", "transformers"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{place}: not a complete {cls.kind} folder ({first_line(error)}); "
                                  f"{cls.where}.") from error

    @classmethod
    def load_part(cls, kind: Any, place: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A model in a sub-folder, in eval mode on the CPU; `kind`: its class in diffusers or transformers.

        Raises:
            CheckpointError: not there, damaged, or without some of its tensors (both libraries only warn of these).
        """
        if not (place / name).is_dir():  # else a hub name
            raise CheckpointError(f"{place / name}: there is no such folder; {cls.where}.")
        with cls.reading(place):
            part, info = kind.from_pretrained(place, subfolder=name, torch_dtype=dtype, local_files_only=True,
                                              output_loading_info=True)
        refuse_tensors(sorted(info["missing_keys"]), (), place / name, "missing from the file")
        return part.eval()

    @classmethod
    def load_unet(cls, place: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The U-Net of a diffusion folder; errors as `load_part`."""
        from diffusers import UNet2DConditionModel

        unet = cls.load_part(UNet2DConditionModel, place, "unet", dtype)
        unet.register_to_config(_name_or_path="")  # no machine's path in what is saved
        return unet

    @classmethod
    def load_vae(cls, place: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The autoencoder of a diffusion folder; errors as `load_part`."""
        from diffusers import AutoencoderKL

        folder = vae_folder(place)
        return cls.load_part(AutoencoderKL, folder.parent, folder.name, dtype)

    @classmethod
    def load_scheduler(cls, place: Path, name: str = "scheduler") -> Any:
        """A scheduler of a diffusion folder. Raises `CheckpointError`: not there."""
        file = place / name / "scheduler_config.json"
        config = read_json_object(file, CheckpointError, cls.where)
        return scheduler_class(str(config.get("_class_name", file))).from_config(config)

    @staticmethod
    def load_layout(place: Path) -> LayoutDecoder | None:
        """The layout decoder that a small model's folder holds."""
        return LayoutDecoder.from_pretrained(place / LAYOUT) if (place / LAYOUT).is_dir() else None

    @classmethod
    def load_safety_checker(cls, place: Path) -> dict[str, Any]:
        """Stable Diffusion's checker of a folder, as arguments of the constructor; nothing where there is none."""
        if not (place / "safety_checker").is_dir():
            return {}
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        with cls.reading(place):
            extractor = CLIPImageProcessor.from_pretrained(place, subfolder="feature_extractor", local_files_only=True)
        return {"safety_checker": cls.load_part(StableDiffusionSafetyChecker, place, "safety_checker"),
                "feature_extractor": extractor}

    @classmethod
    def load_text_encoder(cls, place: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Tokenizer and text encoder of a folder, as arguments of the constructor; nothing where there is none."""
        if not (place / "text_encoder").is_dir():
            return {}
        from transformers import CLIPTextModel, CLIPTokenizer

        with cls.reading(place):
            tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer", local_files_only=True)
        return {"text_encoder": cls.load_part(CLIPTextModel, place, "text_encoder", dtype), "tokenizer": tokenizer}


def guidance(scale: float) -> Callable[[Tensor], Tensor]:
    """Classifier-free guidance of predictions `[2 B, …]`, unconditional ones first; of `[B, …]` up to a scale of 1."""
    def combine(prediction: Tensor) -> Tensor:
        if scale <= 1:
            return prediction
        away, toward = prediction.chunk(2)
        return away + scale * (toward - away)

    return combine


def empty_prompt(text_encoder: Any, tokenizer: Any, device: torch.device, length: int | None = None) -> Tensor:
    """A text encoder's embeddings of the empty prompt, `[1, length, W]`; None: the tokenizer's own length."""
    words = tokenizer("", padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True,
                      return_tensors="pt").to(device)
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    hidden: Tensor = text_encoder(words.input_ids, attention_mask=words.attention_mask if masked else None)[0]
    return hidden


def each(values: Tensor, count: int) -> Tensor:
    """`[B, …]` or `[1, …]` as `[B, …]`."""
    return values.expand(count, *values.shape[1:])


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler class; `ConfigError` names the nearest for an unknown one."""
    import diffusers

    names = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
    if name not in names:
        raise ConfigError(f"Unknown scheduler {name!r}{nearest(name, names)}: give a diffusers class.")
    return getattr(diffusers, name)


def vae_folder(place: Path) -> Path:
    """The autoencoder of a diffusion folder: its own `vae/`, or `{"folder": "../…"}` of its `vae.json`."""
    file = place / VAE_ELSEWHERE
    if (place / "vae").is_dir() or not file.is_file():
        return place / "vae"
    values = read_json_object(file, CheckpointError)
    check_keys(values, ("folder",), str(file))
    return (place / check_value(str, values.get("folder"), f"{file}: folder")).resolve()
