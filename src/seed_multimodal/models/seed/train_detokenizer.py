"""A decoder for SEED's codes as a trainer task: a denoiser learns to draw images from their codes.

The frozen tokenizer encodes an image and decodes its codes to the denoiser's conditions, so images
alone suffice. The result is OUTPUT_DIR/decoder, for `CodesDetokenizer.from_pretrained`.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.pairs_dataset import TargetView
from seed_multimodal.device import DTYPES
from seed_multimodal.diffusion.base import scheduler_class
from seed_multimodal.diffusion.networks import (
    DENOISERS,
    conditions_of,
    context_dim,
    denoiser_kind,
    pooled_dim,
    predict,
    size_unit,
    spatial_factor,
)
from seed_multimodal.diffusion.objectives import NoisyLatents
from seed_multimodal.diffusion.training import train_unet
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.models.seed.code_adapter import (
    CODE_ADAPTER,
    CodeAdapter,
    CodeAdapterConfig,
    Reads,
    stored_reads,
)
from seed_multimodal.models.seed.diffusion import (
    SAFETY_PARTS,
    CodesDetokenizer,
    UnclipDetokenizer,
    detokenizer_class,
)
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.layers import checkpointed
from seed_multimodal.settings import check_keys, nearest, setting
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.pixel_decoder.distill import DistillableTask
from seed_multimodal.training.pixel_decoder.task import (
    NEEDED,
    CodesImages,
    CodesPixelModel,
    EncodedImages,
    PixelRunSettings,
)
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(kw_only=True)
class SeedDecoderModel(CodesPixelModel):
    """Trained and frozen models.

    Attributes:
        diffusion: a diffusers folder: autoencoder; denoiser and scheduler unless they are set here.
            With `start` or `teacher` not read.
        tokenizer: of SEED-2, as `Seed2Tokenizer.from_pretrained`; `vision`: see there.
        reads: what the denoiser reads: an embedding of each code, or the one pooled embedding.
        denoiser: sizes of a new denoiser, with `_class_name`, as in a `config.json` of diffusers;
            {}: the folder's.
        scheduler: settings of a new scheduler, likewise; it determines the objective.
        adapter_depth: transformer blocks between the tokenizer and the denoiser.
        start: an earlier result to start from, with its scheduler unless it is set here.
        trained: parameters of the denoiser; the adapter is always trained.
        dropout: share of images without conditions, for guidance.
    """

    vision: str = ""
    reads: Reads = "codes"
    denoiser: JsonObject = setting(factory=dict)
    scheduler: JsonObject = setting(factory=dict)
    adapter_depth: int = setting(2, minimum=0)
    dropout: float = setting(0.1, minimum=0, maximum=1)


@dataclass(kw_only=True)
class SeedDecoderRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: SeedDecoderModel
    data: CodesImages


class CodesDecoder(nn.Module):
    """The trained networks: denoiser and adapter."""

    def __init__(self, denoiser: nn.Module, code_adapter: CodeAdapter) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.code_adapter = code_adapter

    def forward(
        self,
        noisy_latents: Tensor,
        steps: Tensor,
        embeds: Tensor,
        time_ids: Tensor,
        without: Tensor,
    ) -> Tensor:
        """The denoiser's prediction `[B, C, h, w]`.

        embeds: what the adapter reads. time_ids: `[B, 6]`, see `size_ids`. without: bool `[B]`,
        images whose conditions are the unconditional ones.
        """
        tokens = self.code_adapter(embeds, without)
        pooled = self.code_adapter.pool(tokens)
        conditions = conditions_of(self.denoiser, tokens, pooled, time_ids)
        return predict(self.denoiser, noisy_latents.to(self.denoiser.dtype), steps, conditions)


class SeedDecoderTask(DistillableTask[CodesDecoder]):
    """One run in one process."""

    run_type = SeedDecoderRunSettings
    model: SeedDecoderModel
    result = "decoder"
    detokenizer_class = CodesDetokenizer
    frozen_name = "tokenizer"
    fixed_settings = (
        "trained",
        "reads",
        "adapter_depth",
        "denoiser",
        "scheduler",
        "flow_times",
        "start",
    )

    def load_scheduler(self) -> SchedulerMixin:
        if not self.model.scheduler:
            return super().load_scheduler()
        part_class = scheduler_class(self.model.scheduler, "model.scheduler")
        return new_part("model.scheduler", part_class, self.model.scheduler)

    def prepare(self) -> None:
        self.tokenizer = Seed2Tokenizer.from_pretrained(
            self.model.tokenizer,
            vision=self.model.vision or None,
            device=self.device,
            dtype=DTYPES[self.settings.precision],
        )
        super().prepare()

    @property
    def view(self) -> TargetView:
        """Resized as by the vision encoder's preprocessing."""
        interpolation = self.tokenizer.visual_encoder.preprocessing.interpolation
        return replace(super().view, encoder_interpolation=interpolation)

    def conditions(self) -> FrozenFeatures:
        """What the tokenizer decodes from the images' own codes."""
        model = self.model
        tokenizer = self.tokenizer
        self.check_side(tokenizer.visual_encoder.image_size)
        config = tokenizer.config
        self.n_codes = config.num_query
        if model.teacher:
            model.reads = stored_reads(self.folder)
        if model.reads == "codes":
            decode = tokenizer.decode_tokens
            self.embedding_dim = config.qformer.width
        else:
            decode = tokenizer.decode
            self.embedding_dim = config.image_features_dim

        def embeddings(pixels: Tensor) -> Tensor:
            normalised = tokenizer.visual_encoder.preprocessing.normalise(pixels)
            return decode(tokenizer.encode(normalised))

        return FrozenFeatures(tokenizer, self.device, embeddings)

    def build(self) -> CodesDecoder:
        model = self.model

        # 1. The denoiser: new, or the folder's.
        if model.denoiser and not model.start:
            denoiser = self.new_denoiser()
        else:
            denoiser = CodesDetokenizer.load_part(self.folder, "denoiser")
        self.width = context_dim(denoiser)

        # 2. The adapter between the tokenizer's width and the denoiser's.
        config = CodeAdapterConfig(
            reads=model.reads,
            width=self.embedding_dim,
            tokens=self.n_codes,
            context_dim=self.width,
            pooled_dim=pooled_dim(denoiser),
            depth=model.adapter_depth,
            heads=heads_of(self.width),
        )
        if model.start:
            adapter = CodesDetokenizer.load_part(self.folder, CODE_ADAPTER)
            if adapter.config != config:
                raise ConfigError(
                    f"model.start: its adapter has {adapter.config}, but this run needs {config}."
                )
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(model.seed)
                adapter = CodeAdapter(config)

        # 3. What is trained.
        module = CodesDecoder(denoiser, adapter.requires_grad_(True)).train()
        train_unet(denoiser, model.trained)
        if model.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(checkpointed)
        self.check_sizes(denoiser)
        return module

    def new_denoiser(self) -> nn.Module:
        """A denoiser of the sizes of `model.denoiser`, those of latents and tokens by default."""
        import diffusers

        # 1. Its class.
        name = str(self.model.denoiser.get("_class_name"))
        if name not in DENOISERS:
            raise ConfigError(
                f"model.denoiser: _class_name is {name!r}{nearest(name, DENOISERS)}; choose one of "
                f"{', '.join(DENOISERS)}."
            )
        part_class = getattr(diffusers, name)

        # 2. The sizes that its class has.
        vae = self.encoders.moments.model
        channels = vae.config.latent_channels
        defaults = {
            "sample_size": max(map(max, self.image_sizes())) // spatial_factor(vae),
            "in_channels": channels,
            "out_channels": channels,
            DENOISERS[name].context_dim: self.embedding_dim,
        }
        known = inspect.signature(part_class.__init__).parameters
        sizes = {key: size for key, size in defaults.items() if key in known}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model.seed)
            denoiser: nn.Module = new_part(
                "model.denoiser", part_class, {**sizes, **self.model.denoiser}
            )
        return denoiser

    def check_sizes(self, denoiser: nn.Module) -> None:
        """Raise ConfigError for an image size that the denoiser cannot have."""
        unit = size_unit(denoiser, self.encoders.moments.model)
        for size in self.image_sizes():
            if size[0] % unit or size[1] % unit:
                raise ConfigError(
                    f"data: sizes and resolution must be multiples of {unit} pixels, not {size}."
                )

    def losses(
        self,
        model: nn.Module,
        latents: Tensor,
        encoded: EncodedImages,
        time_ids: Tensor,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]:
        without = torch.rand(len(latents), generator=generator) < self.model.dropout
        noisy = NoisyLatents.sample(self.objective, latents, generator)
        without = without.to(latents.device)
        embeds = self.embeds(encoded.conditions)
        return noisy.losses(model(noisy.latents, noisy.steps, embeds, time_ids, without))

    def embeds(self, conditions: Tensor) -> Tensor:
        return conditions.float()

    def load_decoder(self, path: str) -> UnclipDetokenizer | CodesDetokenizer:
        """A result of this training, or SEED-2's stable-unCLIP."""
        folder = find_folder(path, NEEDED, CodesDetokenizer.download_hint)
        return detokenizer_class(folder).from_pretrained(folder, safety_checker=False)

    def detokenizer(self, scheduler: SchedulerMixin) -> CodesDetokenizer:
        module = self.module
        vae = self.encoders.moments.model
        return CodesDetokenizer(module.denoiser, vae, scheduler, module.code_adapter)

    def save_result(self, module: CodesDecoder, folder: Path) -> None:
        """For `CodesDetokenizer.from_pretrained`."""
        # 1. What was trained, and its scheduler.
        denoiser = module.denoiser
        denoiser.save_pretrained(folder / denoiser_kind(denoiser).folder)
        module.code_adapter.save_pretrained(folder / CODE_ADAPTER)
        self.load_scheduler().save_pretrained(folder / "scheduler")

        # 2. The frozen rest.
        shutil.copytree(self.folder / "vae", folder / "vae", dirs_exist_ok=True)
        for name in SAFETY_PARTS:
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, folder / name, dirs_exist_ok=True)


def heads_of(width: int) -> int:
    """Heads of about 64 channels that divide a width."""
    heads = max(1, width // 64)
    while width % heads:
        heads -= 1
    return heads


def new_part(label: str, part_class: Any, values: Mapping[str, Any]) -> Any:
    """A network or scheduler of diffusers from its settings.

    label: in messages.

    Raises ConfigError: an unknown setting, a wrong value.
    """
    # Names with "_" are those that diffusers adds to a saved config.
    settings = {key: value for key, value in values.items() if not key.startswith("_")}
    check_keys(settings, inspect.signature(part_class.__init__).parameters, label)
    try:
        return part_class(**settings)
    except (TypeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{label}: {part_class.__name__} cannot have these sizes ({reason})."
        ) from error
