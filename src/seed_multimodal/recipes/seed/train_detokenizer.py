"""A decoder of codes as a trainer task: a denoiser learns to draw images from their codes.

SEED's frozen tokenizer encodes an image and decodes its codes to the denoiser's conditions, so
images alone suffice. The codes themselves (`reads: ids`) may be of any tokenizer: of another
family, registered by an entry point, or recorded. The result is OUTPUT_DIR/decoder, for
`CodesDetokenizer.from_pretrained`.

An entry point of the group `seed_multimodal.tokenizers` is a function of a device. It returns an
object with `network`, `transform`, `codebook_size` and `codes_per_image` as of a `CodeCodec`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from seed_multimodal.data.stream.targets import RecordedCodes
from seed_multimodal.device import DTYPES, seeded
from seed_multimodal.diffusion.base import SAFETY_PARTS, scheduler_class
from seed_multimodal.diffusion.networks import (
    DENOISERS,
    context_dim,
    denoiser_kind,
    pooled_dim,
    size_unit,
    spatial_factor,
)
from seed_multimodal.diffusion.training import new_part
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.code_adapter import (
    CODE_ADAPTER,
    CodeAdapter,
    CodeAdapterConfig,
    Reads,
    stored_reads,
)
from seed_multimodal.models.seed.diffusion import (
    CodesDetokenizer,
    UnclipDetokenizer,
    detokenizer_class,
)
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.pipelines.images import open_images
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import nearest, non_negative, setting
from seed_multimodal.training.pixel_decoder.config import (
    CodesImages,
    CodesPixelModel,
    PixelRunSettings,
)
from seed_multimodal.training.pixel_decoder.task import NEEDED, PixelTask
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


CODE_WIDTH = 256  # of embeddings of codes that are read themselves


@dataclass(kw_only=True)
class SeedDecoderModel(CodesPixelModel):
    """Trained and frozen models.

    Attributes:
        diffusion: a diffusers folder: autoencoder; denoiser and scheduler unless they are set here.
            With `start` or `teacher` not read.
        tokenizer: of SEED-2, as `Seed2Tokenizer.from_pretrained`; `vision`: see there. With
            `reads: ids` of any family, or the name of a registered one.
        reads: what the denoiser reads: an embedding of each code, the one pooled embedding, or the
            codes themselves.
        recorded: sizes of codes in the images' records, instead of `tokenizer`.
        denoiser: sizes of a new denoiser, with `_class_name`, as in a `config.json` of diffusers;
            {}: the folder's.
        scheduler: settings of a new scheduler, likewise; it determines the objective.
        adapter_depth: transformer blocks between the tokenizer and the denoiser.
        start: an earlier result to start from, with its scheduler unless it is set here.
        trained: parameters of the denoiser; the adapter is always trained.
    """

    tokenizer: Path | None = None
    recorded: RecordedCodes | None = None
    vision: str = ""
    reads: Reads = "codes"
    denoiser: JsonObject = setting(factory=dict)
    scheduler: JsonObject = setting(factory=dict)
    adapter_depth: int = non_negative(2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tokenizer is None) == (self.recorded is None):
            raise ConfigError("model: either tokenizer or recorded must be set.")
        if self.recorded is not None and not self.teacher and self.reads != "ids":
            raise ConfigError(f"model: recorded codes are read as ids, not as {self.reads}.")


@dataclass(kw_only=True)
class SeedDecoderRunSettings(PixelRunSettings):
    """Settings of a run."""

    model: SeedDecoderModel
    data: CodesImages


class SeedDecoderTask(PixelTask):
    """One run in one process."""

    run_type = SeedDecoderRunSettings
    model: SeedDecoderModel
    result = "decoder"
    detokenizer_class = CodesDetokenizer
    frozen_name = "tokenizer"
    fixed_settings = (
        "trained",
        "reads",
        "recorded",
        "adapter_depth",
        "denoiser",
        "scheduler",
        "flow_times",
        "start",
    )
    copied = ("vae", *SAFETY_PARTS)

    def load_scheduler(self) -> SchedulerMixin:
        if not self.model.scheduler:
            return super().load_scheduler()
        part_class = scheduler_class(self.model.scheduler, "model.scheduler")
        return new_part("model.scheduler", part_class, self.model.scheduler)

    def conditions(self) -> FrozenFeatures:
        """What the tokenizer decodes from the images' own codes, or these codes."""
        model = self.model
        if model.teacher:
            model.reads = stored_reads(self.folder)
        self.vocabulary = 0
        if model.reads == "ids":
            return self.any_codes()
        assert model.tokenizer is not None
        tokenizer = Seed2Tokenizer.from_pretrained(
            model.tokenizer,
            vision=model.vision or None,
            device=self.device,
            dtype=DTYPES[self.settings.precision],
        )
        preprocessing = tokenizer.visual_encoder.preprocessing
        self.resize_as(preprocessing)
        config = tokenizer.config
        self.n_codes = config.num_query
        if model.reads == "codes":
            decode = tokenizer.decode_tokens
            self.embedding_dim = config.qformer.width
        else:
            decode = tokenizer.decode
            self.embedding_dim = config.image_features_dim

        def embeddings(pixels: Tensor) -> Tensor:
            return decode(tokenizer.encode(preprocessing.normalise(pixels)))

        return FrozenFeatures(tokenizer, self.device, embeddings)

    def any_codes(self) -> FrozenFeatures:
        """Recorded codes, or those of a frozen tokenizer of any family or of a registered one."""
        model = self.model
        source: Any = model.recorded
        entries = registered("tokenizers")
        if str(model.tokenizer) in entries:
            source = import_entry(entries[str(model.tokenizer)])(self.device)
        elif model.tokenizer is not None:
            dtype = DTYPES[self.settings.precision]
            source = open_images(model.tokenizer, device=str(self.device), dtype=dtype)
        if not source.codes_per_image:
            raise ConfigError(f"{model.tokenizer}: its images are features, they have no codes.")
        self.n_codes = source.codes_per_image
        self.vocabulary = source.codebook_size
        self.embedding_dim = CODE_WIDTH
        self.recorded = model.recorded
        if self.recorded is not None:
            return FrozenFeatures(nn.Identity(), self.device, lambda codes: codes)
        return self.codes_of(source.network, source.transform)

    def embeds(self, conditions: Tensor) -> Tensor:
        return conditions if self.model.reads == "ids" else conditions.float()

    def new_detokenizer(self, vae: nn.Module, scheduler: SchedulerMixin) -> CodesDetokenizer:
        model = self.model

        # 1. The denoiser: new, or the folder's.
        if model.denoiser and not model.start:
            denoiser = self.new_denoiser()
        else:
            denoiser = CodesDetokenizer.load_part(self.folder, "denoiser")
        width = context_dim(denoiser)

        # 2. The adapter between the tokenizer's width and the denoiser's.
        config = CodeAdapterConfig(
            reads=model.reads,
            width=self.embedding_dim,
            tokens=self.n_codes,
            context_dim=width,
            pooled_dim=pooled_dim(denoiser),
            depth=model.adapter_depth,
            heads=heads_of(width),
            vocabulary=self.vocabulary,
        )
        if model.start:
            adapter = CodesDetokenizer.load_part(self.folder, CODE_ADAPTER)
            if adapter.config != config:
                raise ConfigError(
                    f"model.start: its adapter has {adapter.config}, but this run needs {config}."
                )
        else:
            with seeded(model.seed):
                adapter = CodeAdapter(config)

        adapter.requires_grad_(True)
        self.check_sizes(denoiser)
        return CodesDetokenizer(denoiser, vae, scheduler, adapter)

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
        with seeded(self.model.seed):
            return new_part("model.denoiser", part_class, {**sizes, **self.model.denoiser})

    def check_sizes(self, denoiser: nn.Module) -> None:
        """Raise ConfigError for an image size that the denoiser cannot have."""
        unit = size_unit(denoiser, self.encoders.moments.model)
        for size in self.image_sizes():
            if size[0] % unit or size[1] % unit:
                raise ConfigError(
                    f"data: sizes and resolution must be multiples of {unit} pixels, not {size}."
                )

    def load_decoder(self, path: str) -> UnclipDetokenizer | CodesDetokenizer:
        """A result of this training, or SEED-2's stable-unCLIP."""
        folder = find_folder(path, NEEDED, CodesDetokenizer.download_hint)
        return detokenizer_class(folder).from_pretrained(folder, safety_checker=False)

    def save_trained(self, detokenizer: CodesDetokenizer, folder: Path) -> None:
        """For `CodesDetokenizer.from_pretrained`, with its scheduler."""
        denoiser = detokenizer.denoiser
        denoiser.save_pretrained(folder / denoiser_kind(denoiser).folder)
        detokenizer.code_adapter.save_pretrained(folder / CODE_ADAPTER)
        self.load_scheduler().save_pretrained(folder / "scheduler")


def heads_of(width: int) -> int:
    """Heads of about 64 channels that divide a width."""
    heads = max(1, width // 64)
    while width % heads:
        heads -= 1
    return heads
