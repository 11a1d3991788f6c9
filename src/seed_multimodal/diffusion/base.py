"""Base of the de-tokenizers: image embeddings → images by denoiser, VAE and scheduler of diffusers.

    images = detokenizer(embeds, seeds=[1, 2, 3], num_inference_steps=20)

An image depends on its embeddings and seed, not on the rest of the batch. Latents are float32
between steps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.config import read_table
from seed_multimodal.diffusion.conditioner import (
    Conditioner,
    Generators,
    load_conditioner,
    seeded_noise,
)
from seed_multimodal.diffusion.networks import (
    AUTOENCODERS,
    DENOISERS,
    DenoiserConditions,
    check_class,
    check_statistics,
    context_dim,
    denoiser_folder,
    is_sdxl,
    predict,
    size_ids,
    size_unit,
    spatial_factor,
    unscaled_latents,
    with_unconditional,
)
from seed_multimodal.diffusion.objectives import flow_shift, is_flow
from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError, SeedWarning
from seed_multimodal.nn.pretrained import (
    PretrainedNetwork,
    load_diffusers_network,
    load_library_model,
    reading_files,
)
from seed_multimodal.progress import import_library
from seed_multimodal.settings import check_value, positive, read_settings, setting
from seed_multimodal.state_dicts import load_checkpoint, missing_weights
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from seed_multimodal.diffusion.offload import OffloadHook

DECODED_PIXELS = 1024**2  # of the images that the autoencoder decodes at once
DEFAULTS = "seed_decode.json"  # default settings of a diffusion folder
FAST_STEPS = 12  # of DPM-Solver++ 2M: as accurate as 20 of PNDM
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors",)


class Part(NamedTuple):
    """How a part of a diffusers folder is stored."""

    classes: Sequence[str] = ()  # that its `config.json` may name; schedulers: any
    module: str = "diffusers"  # of these classes
    folder: str = ""  # its sub-folder, if that has another name
    files: Sequence[str] = DIFFUSERS_WEIGHTS  # one of them must exist
    optional: str = ""  # the sub-folder without which it is left out


PARTS = {
    "denoiser": Part(tuple(DENOISERS)),  # in `unet` or `transformer`
    "vae": Part(AUTOENCODERS),
    **{name: Part(**row) for name, row in read_table(__file__).items()},
}
# Files of a part, and the key of its class where there is no `_class_name`.
CLASS_KEYS = {"config.json": "architectures", "tokenizer_config.json": "tokenizer_class"}
SAFETY_PARTS = ("safety_checker", "feature_extractor")
# Attributes of de-tokenizers with weights, in order of use.
NETWORKS = (
    "text_encoder",
    "t5_encoder",
    "decoder",
    "code_adapter",
    "conditioner",
    "resampler",
    "denoiser",
    "vae",
    "safety_checker",
)


@dataclass(frozen=True)
class DrawingSettings:
    """Defaults may be set by a folder's `seed_decode.json`."""

    num_inference_steps: int = positive(20, maximum=1000)
    guidance_scale: float = 10.0  # up to 1: one run of the denoiser
    height: int | None = setting(None, minimum=8, maximum=16_384)  # in pixels
    width: int | None = setting(None, minimum=8, maximum=16_384)
    # "original": the folder's scheduler; "fast": DPM-Solver++ 2M with at most `FAST_STEPS` steps
    preset: Literal["original", "fast"] = "original"


Settings = TypeVar("Settings", bound=DrawingSettings)
# Of images, and what computes those without them, for guidance.
Conditions = tuple[DenoiserConditions, Callable[[], DenoiserConditions]]


@dataclass
class Denoising:
    """What the denoising loop reads for B images, with R runs of the denoiser a step."""

    start: Tensor  # noise [B, C, h, w]
    n_runs: int
    # of all runs together, R · B rows; or of each run, B rows
    passes: Sequence[DenoiserConditions]
    guide: Callable[[Tensor], Tensor]  # combines the predictions of the R runs
    concatenated: Tensor | None = None  # further input channels, R · B rows
    # of the scheduler: what the denoiser is told, and the noise; None: by their number
    times: Mapping[str, Any] | None = None

    def predict(self, denoiser: nn.Module, noisy: Tensor, step: Tensor) -> Tensor:
        """The guided prediction `[B, C, h, w]` in float32.

        step: the scheduler's time step, one for all or one each.
        """
        n_together = self.n_runs // len(self.passes)
        inputs = noisy.repeat(n_together, 1, 1, 1)
        if step.ndim:
            step = step.repeat(n_together)
        if self.concatenated is not None:
            inputs = torch.cat([inputs, self.concatenated.to(inputs)], dim=1)
        predictions = [predict(denoiser, inputs, step, conditions) for conditions in self.passes]
        return self.guide(torch.cat(predictions).float())


@dataclass(eq=False)
class Detokenizer(Generic[Settings]):
    """Parts of a diffusers folder that draw; families define `conditions`.

    denoiser, vae, scheduler: of diffusers.
    conditioner: starts the sampling from an embedding.
    safety_checker: flagged images become black; with its `feature_extractor`.
    """

    denoiser: nn.Module
    vae: nn.Module
    scheduler: SchedulerMixin
    _: KW_ONLY
    defaults: Settings = None  # type: ignore[assignment]  # None: of `settings_class`
    text_encoder: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    conditioner: Conditioner | None = None
    safety_checker: PreTrainedModel | None = None
    feature_extractor: BaseImageProcessor | None = None

    label: ClassVar[str] = "diffusers"  # in error messages
    # In error messages: where to get the weights.
    download_hint: ClassVar[str] = "give a folder of diffusers"
    settings_class: ClassVar[type[DrawingSettings]]
    folders: ClassVar[tuple[str, ...]] = ("denoiser", "vae", "scheduler")  # parts that are loaded
    float32: ClassVar[tuple[str, ...]] = ("safety_checker",)  # parts that stay in float32
    noise_dtype: ClassVar[torch.dtype | None] = None  # None: of the denoiser
    # Trained networks: names in checkpoints → attributes.
    trained: ClassVar[Mapping[str, str]] = {"denoiser": "denoiser"}
    reads: ClassVar[str] = "embedding"  # of an image, "codes": of each code, "ids": codes
    reads_condition = False  # whether it reads condition images
    joins_runs = True  # the runs of guidance are one pass, so their conditions have equal shapes

    def __post_init__(self) -> None:
        if self.defaults is None:
            self.defaults = self.settings_class()  # type: ignore[assignment]
        self.device = torch.device(self.denoiser.device)
        check_statistics(self.vae)
        self.factor = spatial_factor(self.vae)  # pixels of a latent's side
        self.size_unit = size_unit(self.denoiser, self.vae)
        self.reads_sizes = is_sdxl(self.denoiser)
        self._hooks: list[OffloadHook] = []

    @property
    def unet(self) -> nn.Module:
        """The denoiser, where it is a U-Net."""
        return self.denoiser

    # ---- defined by families

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings; 0: it reads other things."""
        raise NotImplementedError

    def read(self, embeds: Any) -> tuple[Any, Tensor]:
        """What `conditions` reads, and what a conditioner reads, on the device."""
        embeds = embeds.to(self.device)
        return embeds, embeds

    def conditions(
        self,
        embeds: Any,
        negatives: Tensor | None,
        time_ids: Tensor | None,
        settings: Settings,
        generators: Generators,
    ) -> Conditions:
        """What the denoiser reads of B images, and a function of what it reads without them.

        embeds: of `read`.
        negatives: unconditional embeddings, B rows; None: the family's.
        time_ids: `[B, 6]` where the denoiser reads them, see `size_ids`.
        """
        raise NotImplementedError

    def guide(self, settings: Settings) -> tuple[int, Callable[[Tensor], Tensor]]:
        """The denoiser's runs a step, and classifier-free guidance of their predictions.

        The unconditional run is the first one.
        """
        scale = settings.guidance_scale
        if scale <= 1:
            return 1, lambda prediction: prediction

        def guided(prediction: Tensor) -> Tensor:
            unconditional, conditional = prediction.chunk(2)
            return unconditional + scale * (conditional - unconditional)

        return 2, guided

    def time_ids(self, settings: Settings, count: int) -> Tensor:
        """SDXL's size conditions `[count, 6]`."""
        return size_ids(self.image_size(settings), count=count).to(self.device)

    def condition_latents(
        self, images: Sequence[Image.Image | None], size: tuple[int, int]
    ) -> Tensor:
        """Latents of condition images, where the denoiser reads them."""
        raise NotImplementedError

    def empty_prompt(self, length: int | None = None) -> Tensor:
        """The text encoder's embeddings of the empty prompt, `[1, length, W]`; without one zeros.

        length: None: the tokenizer's own.
        """
        if self.text_encoder is None:
            shape = (1, length or 1, context_dim(self.denoiser))
            return torch.zeros(shape, dtype=torch.float32, device=self.device)
        return empty_prompt(self.text_encoder, self.tokenizer, self.device, length)

    # ---- settings

    def check_settings(self, **overrides: object) -> Settings:
        """The defaults, overridden by settings that are not None. Raises ConfigError."""
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if overrides.get("preset") == "fast":
            steps = min(self.defaults.num_inference_steps, FAST_STEPS)
            overrides.setdefault("num_inference_steps", steps)
        values = {**vars(self.defaults), **overrides}
        settings: Settings = check_value(type(self.defaults), values, "Drawing setting")
        self.image_size(settings)
        return settings

    def image_size(self, settings: Settings) -> tuple[int, int]:
        """Height and width of an image."""
        side = int(self.denoiser.config.sample_size) * self.factor
        height = settings.height or side
        width = settings.width or side
        unit = self.size_unit
        if height % unit or width % unit:
            raise ConfigError(
                f"Height and width must be multiples of {unit} pixels, not {height} and {width}."
            )
        return height, width

    # ---- drawing

    @torch.no_grad()
    def __call__(
        self,
        embeds: Tensor | Sequence[Tensor],
        *,
        negative_embeds: Tensor | None = None,
        condition_images: Sequence[Image.Image | None] | None = None,
        seeds: Sequence[int] | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Generate an image for each row of `embeds`, all together. Raises ConfigError.

        negative_embeds: unconditional embeddings for guidance, one for all or one each.
        condition_images: for SEED-X's second stage, an image or None each.
        seeds: None: random.
        settings: fields of `settings_class`.
        """
        # 1. Embeddings of this de-tokenizer, and unconditional ones for each image.
        checked = self.check_settings(**settings)
        n_images = len(embeds)
        if not n_images:
            return []
        widths = {row.shape[-1] for row in embeds} if self.embedding_dim else set()
        for width in widths:
            if width != self.embedding_dim:
                raise CheckpointError(
                    f"The embeddings have width {width}, but this diffusion model needs width "
                    f"{self.embedding_dim}: tokenizer and de-tokenizer do not belong together."
                )
        if negative_embeds is not None:
            negative_embeds = negative_embeds.expand(n_images, *negative_embeds.shape[1:])
        if seeds is None:
            seeds = torch.randint(2**62, (n_images,), device="cpu").tolist()

        # 2. The images.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        latents = self.denoise(checked, generators, embeds, negative_embeds, condition_images)
        images = self.to_images(latents)
        for hook in self._hooks:
            hook.offload()
        return images

    def denoise(
        self,
        settings: Settings,
        generators: Generators,
        embeds: Tensor | Sequence[Tensor],
        negatives: Tensor | None = None,
        images: Sequence[Image.Image | None] | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """The denoising loop: latents `[B, C, h, w]` in float32; arguments as of `prepare`."""
        denoising = self.prepare(settings, generators, embeds, negatives, images, start)

        # 1. The scheduler.
        scheduler = self.scheduler
        if settings.preset == "fast":
            scheduler = fast_scheduler(scheduler)
        times = denoising.times or {"num_inference_steps": settings.num_inference_steps}
        scheduler.set_timesteps(**times, device=self.device)
        step_options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_options["generator"] = list(generators)

        # 2. The loop. Flow schedulers scale neither the initial noise nor the input.
        noise = denoising.start.to(self.device, torch.float32)
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for step in scheduler.timesteps:
            noisy = latents
            if hasattr(scheduler, "scale_model_input"):
                noisy = scheduler.scale_model_input(latents, step)
            prediction = denoising.predict(self.denoiser, noisy, step)
            latents = scheduler.step(prediction, step, latents, **step_options).prev_sample
        return latents

    def prepare(
        self,
        settings: Settings,
        generators: Generators,
        embeds: Tensor | Sequence[Tensor],
        negatives: Tensor | None = None,
        images: Sequence[Image.Image | None] | None = None,
        start: Tensor | None = None,
    ) -> Denoising:
        """What the denoising loop reads.

        negatives: unconditional embeddings, B rows; None: the family's.
        images: condition images, where `reads_condition`; None: none.
        start: initial latents; None: by the conditioner if there is one, else noise.
        """
        # 1. Start and conditions. Each generator draws for a conditioner before it draws for the
        #    conditions, and the noise after them, as stock pipelines.
        height, width = self.image_size(settings)
        latent_size = height // self.factor, width // self.factor
        condition = None
        if self.reads_condition:
            condition = self.condition_latents(images or [None] * len(embeds), (height, width))
        read, features = self.read(embeds)
        if start is None and self.conditioner is not None:
            start = self.conditioner.warm_latents(
                features, generators, self.scheduler, condition, latent_size
            )
        time_ids = self.time_ids(settings, len(embeds)) if self.reads_sizes else None
        conditions, null = self.conditions(read, negatives, time_ids, settings, generators)
        n_runs, guide = self.guide(settings)
        passes = [conditions]
        if n_runs > 1:
            passes = [null(), conditions]
            if self.joins_runs:
                passes = [with_unconditional(conditions, passes[0], n_runs)]
        if start is None:
            shape = (self.vae.config.latent_channels, *latent_size)
            start = seeded_noise(generators, shape, self.noise_dtype or self.denoiser.dtype)

        # 2. The condition images, with rows for each run of the denoiser.
        if n_runs > 1 and condition is not None:
            rows = [condition] * (n_runs - 1)
            condition = torch.cat([torch.zeros_like(condition), *rows])
        return Denoising(start, n_runs, passes, guide, condition)

    def to_images(self, latents: Tensor) -> list[Image.Image]:
        """Latents as PIL images, black where the safety checker flags them.

        Raises `GenerationError`: NaN.
        """
        pixels = self.decode(latents)
        if not bool(torch.isfinite(pixels).all()):
            raise GenerationError(
                "The diffusion model computed NaN or infinity: use bfloat16 or float32."
            )
        array = pixels.permute(0, 2, 3, 1).float().cpu().numpy()  # [B, H, W, 3]
        images = [Image.fromarray(row) for row in (array * 255).round().astype("uint8")]
        checker = self.safety_checker
        if checker is None:
            return images

        # The safety checker reads its own preprocessed pixels, and gives one flag an image.
        assert self.feature_extractor is not None
        with torch.autocast(self.device.type, enabled=False):
            inputs = self.feature_extractor(images, return_tensors="pt").pixel_values
            inputs = inputs.to(self.device, checker.dtype)
            flags = checker(clip_input=inputs, images=np.zeros((len(images), 1)))[1]
        if any(flags):
            warnings.warn(
                f"The safety checker made {sum(flags)} of {len(images)} images black.",
                SeedWarning,
                2,
            )
        for index, is_flagged in enumerate(flags):
            if is_flagged:
                images[index] = Image.new("RGB", images[index].size)
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` → pixels in 0…1 `[B, 3, H, W]`.

        The autoencoder computes in its own precision, whatever the caller's autocast.
        """
        from diffusers import AutoencoderTiny

        vae = self.vae
        # Channels last halves the time of small autoencoders on CPUs; in large ones it gains
        # nothing, and torch's GroupNorm is less exact.
        is_small = isinstance(vae, AutoencoderTiny)
        layout = torch.channels_last if is_small else torch.preserve_format
        n_pixels = latents[0, 0].numel() * self.factor**2
        decoded = []
        with torch.autocast(self.device.type, enabled=False):
            for batch in latents.split(max(1, DECODED_PIXELS // n_pixels)):
                unscaled = unscaled_latents(vae, batch.to(self.device))
                unscaled = unscaled.to(vae.dtype, memory_format=layout)
                decoded.append(vae.decode(unscaled).sample)
        pixels = torch.cat(decoded)  # in -1…1
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    # ---- devices

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All parts with weights, in order of use."""
        parts = {name: getattr(self, name, None) for name in NETWORKS}
        return {name: part for name, part in parts.items() if part is not None}

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
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = True,
    ) -> Self:
        """Load a diffusers folder.

        safety_checker: use the folder's, if it has one; flagged images are black.

        Raises:
            CheckpointError: missing (with download instructions), incomplete, or damaged.
        """
        names = (*cls.folders, *SAFETY_PARTS) if safety_checker else cls.folders
        files = ["unet/*", "transformer/*", *(f"{name}/*" for name in names)]
        path = find_folder(folder, files, cls.download_hint)
        return cls(**cls.load_parts(path, dtype, *names)).to(device)

    @classmethod
    def load_parts(cls, folder: Path, dtype: torch.dtype, *names: str) -> dict[str, Any]:
        """Arguments of the constructor from a diffusion folder.

        These are the named parts, default settings and the conditioner, as far as the folder has
        them. Raises CheckpointError.
        """
        # 1. Named parts. All files must exist before the first is loaded.
        cls.check_parts(folder, *names)
        parts: dict[str, Any] = {}
        for name in names:
            if (folder / PARTS[name].optional).is_dir():
                part_dtype = torch.float32 if name in cls.float32 else dtype
                parts[name] = cls.load_part(folder, name, part_dtype)

        # 2. What only our folders have.
        file = folder / DEFAULTS
        if file.is_file():
            values = read_json_object(file, ConfigError)
            parts["defaults"] = read_settings(cls.settings_class, values, str(file))
        parts["conditioner"] = load_conditioner(folder)
        return parts

    @classmethod
    def check_folder(cls, folder: Path | None) -> None:
        """Raise CheckpointError if a folder is there, but lacks a file."""
        if folder is not None and folder.is_dir():
            cls.check_parts(folder, *cls.folders)

    @classmethod
    def check_parts(cls, folder: Path, *names: str) -> None:
        """Raise CheckpointError if a file of these parts is missing, without loading any."""
        for name in names:
            if not (folder / PARTS[name].optional).is_dir():
                continue
            part_folder = _part_folder(folder, name)
            missing = _missing_path(part_folder, name)
            if missing is not None:
                kind = "folder" if missing == part_folder else "file"
                raise CheckpointError(
                    f"{missing}: no such {kind}, so the {cls.label} folder is not complete; "
                    f"{cls.download_hint}."
                )

    @classmethod
    def load_part(cls, folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A part of `PARTS`, networks in eval mode. Raises `CheckpointError`."""
        # 1. A scheduler has no weights.
        part_folder = _part_folder(folder, name)
        if name.endswith("scheduler"):
            file = part_folder / "scheduler_config.json"
            config = read_json_object(file, CheckpointError, cls.download_hint)
            return new_scheduler(scheduler_class(config, file), config)

        # 2. A folder is required: diffusers would treat its name as one of the hub.
        if not part_folder.is_dir():
            raise CheckpointError(f"{part_folder}: no such folder; {cls.download_hint}.")

        # 3. Load it.
        part = PARTS[name]
        part_class = getattr(import_library(part.module), stored_class(part_folder, part))
        if issubclass(part_class, PretrainedNetwork):
            return part_class.from_pretrained(part_folder, dtype=dtype)
        label = f"{cls.label} folder"
        if part.files == DIFFUSERS_WEIGHTS:
            values = read_json_object(part_folder / "config.json", CheckpointError)
            state = load_checkpoint(part_folder)
            return load_diffusers_network(part_class, values, state, part_folder, dtype)
        if issubclass(part_class, nn.Module):
            return load_library_model(
                part_class, part_folder, label, cls.download_hint, dtype=dtype
            )[0]
        with reading_files(part_folder, label, cls.download_hint):
            return part_class.from_pretrained(part_folder, local_files_only=True)


def stored_class(folder: Path, part: Part) -> str:
    """The class that a part's files name; none: the usual one. Raises CheckpointError: another one
    than the part's."""
    for file_name, class_key in CLASS_KEYS.items():
        file = folder / file_name
        values = read_json_object(file, CheckpointError) if file.is_file() else {}
        for key in ("_class_name", class_key):
            if name := values.get(key):
                # transformers' models have a list of classes.
                return check_class(
                    name[0] if isinstance(name, list) else name, part.classes, file, key
                )
    return part.classes[0]


def scheduler_class(config: JsonObject, label: str | Path) -> Any:
    """The class in a scheduler's configuration. Raises CheckpointError."""
    diffusers = import_library("diffusers")
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return getattr(diffusers, check_class(config.get("_class_name"), names, label))


def fast_scheduler(scheduler: SchedulerMixin, **settings: object) -> SchedulerMixin:
    """DPM-Solver++ 2M with the noise schedule of another scheduler, and further settings."""
    # "leading" time steps would begin too late for few steps.
    changes = {"timestep_spacing": "trailing", **settings}
    if is_flow(scheduler):
        changes |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": flow_shift(scheduler),
        }
    library = import_library("diffusers.schedulers.scheduling_dpmsolver_multistep")
    return new_scheduler(library.DPMSolverMultistepScheduler, scheduler.config, **changes)


def new_scheduler(
    scheduler_class: Any, config: Mapping[str, Any], **changes: object
) -> SchedulerMixin:
    """A scheduler by its configuration, on the CPU."""
    with torch.device("cpu"):
        return scheduler_class.from_config(config, **changes)


def empty_prompt(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    length: int | None = None,
) -> Tensor:
    """A text encoder's embeddings of the empty prompt, `[1, length, W]`.

    tokenizer: None: the prompt is CLIP's, one start, then ends.
    length: None: the tokenizer's own.
    """
    # 1. Its ids. Padding is attended, too, unless the encoder was trained otherwise.
    config = text_encoder.config
    attention_mask = None
    if tokenizer is None:
        n_ends = (length or config.max_position_embeddings) - 1
        ids = [config.bos_token_id, *[config.eos_token_id] * n_ends]
        input_ids = torch.tensor([ids], dtype=torch.long, device=device)
    else:
        encoded = tokenizer(
            "",
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        input_ids = encoded.input_ids
        if getattr(config, "use_attention_mask", False):
            attention_mask = encoded.attention_mask.to(device)

    # 2. The encoder.
    return text_encoder(input_ids.to(device), attention_mask=attention_mask)[0]


def _part_folder(folder: Path, name: str) -> Path:
    if name == "denoiser":
        return denoiser_folder(folder)
    return folder / (PARTS[name].folder or name)


def _missing_path(folder: Path, name: str) -> Path | None:
    """The folder of a part if it does not exist, or the first file that it lacks.

    None: complete.
    """
    if not folder.is_dir():
        return folder
    files = PARTS[name].files
    if files[0].endswith(".safetensors"):
        return missing_weights(folder, files[0])
    if any((folder / file).is_file() for file in files):
        return None
    return folder / files[0]
