"""Base of the de-tokenizers: loads a diffusers folder as a pipeline and turns embeddings into pictures in batches.

A folder's `seed_decode.json` may set steps, guidance and scheduler. Every picture has its own generator: its pixels do
not depend on the others in its batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.detokenizers.schedulers import using
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.finite import not_numbers
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.settings import check_value, read_settings, setting
from seed_multimodal.weights import refuse_tensors

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class DecodeDefaults:
    """Default settings of `decode`: the released values, or those in the folder's `seed_decode.json`."""

    num_inference_steps: int = setting(20, least=1)
    guidance_scale: float = 10.0
    scheduler: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Defaults of a folder; `ConfigError` for an unreadable file or an unknown setting."""
        file = folder / "seed_decode.json"
        return read_settings(cls, read_json_object(file, ConfigError), str(file)) if file.is_file() else cls()


class PipelineDetokenizer:
    """A diffusers pipeline and its settings; loading, sizes and the batch loop.

    Attributes:
        kind: of folder, in messages; `where`: what to download for it.
        parts: of the pipeline that must be there. optional: may be left out of the folder.
        axes: of the embeddings before their width, such as "B, n"; `use`: what the model does with the width.
        negatives: the argument of `decode` for embeddings to steer away from.
        defaults_class: what `seed_decode.json` is read as.
        own_schedulers: further names of schedulers, each with how one is made from another's configuration.
    """

    kind: ClassVar[str]
    where: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "scheduler")
    optional: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    axes: ClassVar[str]
    use: ClassVar[str]
    negatives: ClassVar[str] = "negative_image_embeds"
    defaults_class: ClassVar[type[DecodeDefaults]] = DecodeDefaults
    own_schedulers: ClassVar[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {}
    decode: Callable[..., list[Any]]  # embeddings → pictures

    def __init__(self, pipeline: Any, defaults: DecodeDefaults | None = None) -> None:
        self.pipeline, self.defaults = pipeline, defaults or self.defaults_class()
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline, imported when it is needed (diffusers is heavy)."""
        raise NotImplementedError

    @classmethod
    def open_folder(cls, place: Path, dtype: torch.dtype, left_out: Sequence[str] = (), **options: Any) -> Self:
        """A diffusers folder, on the CPU, without diffusers' progress bars and warnings.

        Args:
            left_out: parts that are not loaded; `options`: further arguments of the pipeline.

        Raises:
            CheckpointError: not there, not complete, or damaged; names the download.
        """
        if not os.path.isfile(place / "model_index.json"):
            raise CheckpointError(f"{place}: there is no diffusion model here (no model_index.json): {cls.where}.")
        defaults = cls.defaults_class.read(place)
        with cls.reading(place):
            index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
            absent = {*left_out, *(name for name in cls.optional if (index.get(name) or [None])[0] is None)}
            options |= _text_parts(place, index, dtype, absent)
            pipeline = cls.pipeline_class().from_pretrained(
                str(place), torch_dtype=dtype, local_files_only=True, **dict.fromkeys(absent), **options)
        for name in cls.parts:
            if getattr(pipeline, name, None) is None:
                raise CheckpointError(f"{place}: the diffusion folder holds no {name!r}; {cls.where}.")
        for name, part in pipeline.components.items():
            refuse_unfilled(part, place / name)
        return cls(pipeline, defaults)

    @classmethod
    @contextlib.contextmanager
    def reading(cls, place: Path) -> Iterator[None]:
        """Inside, diffusers reads a folder in silence, and what it raises becomes a `CheckpointError` of one sentence;
        errors of ours stay as they are."""
        from safetensors import SafetensorError

        try:
            with quiet_loading("diffusers", "transformers"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # every diffusers below 1 accepts the name `torch_dtype`
                yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{place}: not a complete {cls.kind} folder ({first_line(error)}); "
                                  f"{cls.where}.") from error

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move every part; returns self."""
        with quiet_loading("diffusers"):  # it warns about every cast, even to the precision that the parts have
            self.pipeline.to(device) if dtype is None else self.pipeline.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.pipeline.unet.device

    @property
    def has_text(self) -> bool:
        """Whether the folder's own text encoder gives the empty prompt."""
        return self.pipeline.text_encoder is not None and self.pipeline.tokenizer is not None

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent (8 for Stable Diffusion)."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings this model was trained on."""
        raise NotImplementedError

    def checked(self, embeds: Tensor, name: str, count: int | None = None) -> Tensor:
        """Embeddings on the pipeline's device.

        Args:
            count: number of pictures, if one for all may be given; the result has one each.

        Raises:
            ConfigError: no floating tensor of that many axes, or of another batch. CheckpointError: another width.
        """
        ndim, width = self.axes.count(",") + 2, self.embedding_dim
        if not isinstance(embeds, Tensor) or embeds.ndim != ndim or not embeds.is_floating_point():
            got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ConfigError(f"{name} must be a floating tensor [{self.axes}, {width}], got {got}.")
        if embeds.shape[-1] != width:
            raise CheckpointError(f"{name} have width {embeds.shape[-1]}, but this diffusion model {self.use} "
                                  f"width {width}: tokenizer and de-tokenizer do not belong together.")
        embeds = embeds.to(self.device)
        return embeds if count is None else for_each(embeds, count, name)

    def with_defaults(self, steps: int | None, guidance: float | None) -> tuple[int, float]:
        """Steps and guidance, the folder's defaults for None; `ConfigError` for more steps than it was trained with."""
        steps = self.defaults.num_inference_steps if steps is None else steps
        guidance = self.defaults.guidance_scale if guidance is None else guidance
        total = self.pipeline.scheduler.config.num_train_timesteps
        return (check_value(int, steps, "num_inference_steps", least=1, most=total),
                check_value(float, guidance, "guidance_scale"))

    def made_type(self, output_type: str) -> str:
        """What the pipeline must give for `output_type`; `ConfigError` for one that it has not."""
        check_value(str, output_type, "output_type", choices=("pil", "np", "pt", "latent"))
        return "pt" if output_type == "pil" else output_type  # `in_batches` checks the tensor and makes the pictures

    def checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, for None what the model was trained on; `ConfigError` for one of them alone, or
        one that the latents have no whole number of."""
        if (height is None) != (width is None):
            raise ConfigError("Give height and width both, or neither.")
        unit, usual = max(8, self.factor), int(self.pipeline.unet.config.sample_size) * self.factor
        for name, value in (("height", height), ("width", width)):
            check_value(int | None, value, f"The {name}", most=16_384)
            if value is not None and (value < unit or value % unit):
                raise ConfigError(f"The {name} must be a multiple of {unit} pixels, got {value}.")
        return height or usual, width or usual

    def check_settings(self, **settings: Any) -> None:
        """Refuse settings that `decode` would refuse, without drawing: `ConfigError`."""
        self.decode(torch.zeros(0, *[1] * self.axes.count(","), self.embedding_dim), **settings)

    def in_batches(self, render: Callable[..., Iterable[Any]], values: Sequence[Tensor | None],
                   generator: Generators, latents: Tensor | None, *, scheduler: Any | None,
                   batch_size: int | None, as_pil: bool, size: tuple[int, int] | None = None) -> list[Any]:
        """`render(*values, generators, latents)` for `batch_size` pictures at a time (None: all).

        A tensor that it gives is checked to hold numbers, and becomes PIL pictures if `as_pil`.

        Args:
            values: tensors of one row per picture, or None; the first is a tensor.
            generator: one for all or one per picture; each picture gets its own (`one_each`).
            latents: one per picture, one for all, or None.
            scheduler: what to sample with (see `using`). size: height and width in pixels, which latents must fit.

        Raises:
            ConfigError: another number of latents or generators than pictures, latents of another size, or a scheduler
                that does not fit.
            CheckpointError, GenerationError: NaN in weights or pictures.
        """
        pictures: list[Any] = []
        check_value(int | None, batch_size, "batch_size", least=1)
        assert values[0] is not None
        count, channels = len(values[0]), self.pipeline.vae.config.latent_channels
        if isinstance(latents, Tensor) and (latents.ndim != 4 or latents.shape[1] != channels):
            raise ConfigError(f"latents must be a tensor [B, {channels}, h, w], got {list(latents.shape)}.")
        if size is not None and isinstance(latents, Tensor) and latents.shape[2:] != (
                size[0] // self.factor, size[1] // self.factor):
            raise ConfigError(f"latents are {latents.shape[2]} x {latents.shape[3]}, but a picture of {size[0]} x "
                              f"{size[1]} has {size[0] // self.factor} x {size[1] // self.factor}.")
        rows = (*values, one_each(generator, count), None if latents is None else for_each(latents, count, "latents"))
        with using(self.pipeline, self.defaults.scheduler if scheduler is None else scheduler, self.own_schedulers):
            for start in range(0, count, batch_size or max(count, 1)):
                part = slice(start, start + (batch_size or count))
                pictures.extend(self._finished(render(*(None if row is None else row[part] for row in rows)), as_pil))
        return pictures

    @property
    def models(self) -> list[nn.Module]:
        """Everything with weights that drawing uses."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def _finished(self, images: Any, as_pil: bool) -> Any:
        finite = torch.isfinite(images).all() if isinstance(images, Tensor) else np.isfinite(images).all()
        if not bool(finite):
            raise not_numbers("The diffusion model", *self.models)
        processor = self.pipeline.image_processor  # these two steps are what output_type="pil" does
        return processor.numpy_to_pil(processor.pt_to_numpy(images)) if as_pil else images


def one_each(generator: Generators, count: int) -> list[torch.Generator] | None:
    """One generator per picture: the first is the given one, the others are seeded from a copy of it.

    Raises:
        ConfigError: another number of generators than pictures.
    """
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
            raise ConfigError(f"generator must be a torch.Generator, or a list of one for each picture, not "
                              f"{generator!r:.80}.")
        if len(generator) != count:
            raise ConfigError(f"{len(generator)} generators were given for {count} pictures.")
        return list(generator)
    copy = generator.clone_state()
    seeds = [int(torch.randint(2**62, (), generator=copy, device=copy.device)) for _ in range(1, count)]
    return [generator, *(torch.Generator(copy.device).manual_seed(seed) for seed in seeds)][:count]


def for_each(values: Tensor, count: int, name: str) -> Tensor:
    """`[B, …]` or `[1, …]` as `[B, …]`; `ConfigError` for no tensor, or another number of samples."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or not values.ndim:
        raise ConfigError(f"{name} must be a floating tensor with one sample for each picture, not "
                          f"{type(values).__name__}.")
    if len(values) not in (1, count):
        raise ConfigError(f"{name} hold {len(values)} samples for {count} pictures.")
    return values.expand(count, *values.shape[1:])


def refuse_unfilled(part: Any, where: Path) -> None:
    """Refuse a model with tensors that its file lacks: diffusers leaves them without memory, and warns only.

    Raises:
        CheckpointError: "WHERE: N tensors are missing from the file: …".
    """
    state = part.state_dict() if isinstance(part, nn.Module) else {}
    refuse_tensors([key for key, value in state.items() if value.is_meta], (), where, "missing from the file")


def _text_parts(place: Path, index: Mapping[str, Any], dtype: torch.dtype, absent: Iterable[str]) -> dict[str, Any]:
    """Parts of a diffusion folder that are transformers models: diffusers would fill what their files lack at random.

    Raises:
        CheckpointError: tensors missing from a part's file.
    """
    import transformers

    parts = {}
    for name, kind in index.items():
        theirs = isinstance(kind, list) and kind[:1] == ["transformers"]
        found: Any = getattr(transformers, str(kind[1]), None) if theirs else None
        if name not in absent and isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            whole: Any = found
            parts[name], info = whole.from_pretrained(place / name, dtype=dtype, local_files_only=True,
                                                      output_loading_info=True)
            refuse_tensors(sorted(info["missing_keys"]), (), place / name, "missing from the file")
    return parts
