"""What the de-tokenizers share: a diffusers folder becomes a pipeline, and embeddings become pictures in batches.

A folder's `seed_decode.json` may set steps, guidance and scheduler. Every picture has its own generator: what it looks
like does not depend on the others in its batch.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.quiet import quiet_loading

DEFAULTS_FILE = "seed_decode.json"
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class DecodeDefaults:
    """What `decode` uses when not told: the released values, or those in the folder's `seed_decode.json`."""

    num_inference_steps: int = 20
    guidance_scale: float = 10.0
    scheduler: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Defaults of a folder; `ConfigError` for an unreadable file or an unknown setting."""
        file = folder / DEFAULTS_FILE
        if not file.is_file():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            unknown = sorted(set(values) - known)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file}: not a JSON mapping of decode settings ({error}).") from error
        if unknown:
            raise ConfigError(f"{file}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)


class PipelineDetokenizer:
    """A diffusers pipeline and what it draws with when not told.

    Attributes:
        parts: of the pipeline that must be there.
        own_schedulers: further names of schedulers, each with how one is made from another's configuration.
    """

    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "scheduler")
    own_schedulers: ClassVar[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {}

    def __init__(self, pipeline: Any, defaults: DecodeDefaults) -> None:
        self.pipeline, self.defaults = pipeline, defaults
        pipeline.set_progress_bar_config(disable=True)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move every part; returns self."""
        with quiet_loading("diffusers"):  # it warns about every cast, even to the precision that the parts have
            self.pipeline.to(device) if dtype is None else self.pipeline.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.pipeline.unet.device

    @classmethod
    def check_parts(cls, pipeline: Any, place: Path, advice: str) -> None:
        """Raises `CheckpointError` for a pipeline of the folder `place` without one of `parts`."""
        for name in cls.parts:
            if getattr(pipeline, name, None) is None:
                raise CheckpointError(f"{place}: the diffusion folder holds no {name!r}; {advice}.")

    def checked(self, embeds: Tensor, name: str, shape: str, width: int, verb: str) -> Tensor:
        """Embeddings on the pipeline's device.

        Args:
            shape: what they must be, such as "B, n"; the last axis is `width`.
            verb: what the model does with that width, for the sentence.

        Raises:
            ConfigError: no floating tensor of that many axes. CheckpointError: another width.
        """
        axes = shape.count(",") + 2
        if not isinstance(embeds, Tensor) or embeds.ndim != axes or not embeds.is_floating_point():
            got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ConfigError(f"{name} must be a floating tensor [{shape}, {width}], got {got}.")
        if embeds.shape[-1] != width:
            raise CheckpointError(f"{name} have width {embeds.shape[-1]}, but this diffusion model {verb} "
                                  f"width {width}: tokenizer and de-tokenizer do not belong together.")
        return embeds.to(self.device)

    def asked(self, steps: int | None, guidance: float | None) -> tuple[int, float]:
        """Steps and guidance, the folder's defaults for None."""
        return (self.defaults.num_inference_steps if steps is None else steps,
                self.defaults.guidance_scale if guidance is None else guidance)

    def in_batches(self, render: Callable[..., Iterable[Any]], count: int, batch_size: int | None,
                   scheduler: Any | None, *values: Any) -> list[Any]:
        """`render(*values)` for `batch_size` pictures at a time (None: all), under the scheduler asked for.

        Args:
            values: each with an entry per picture, or None.
        """
        pictures: list[Any] = []
        with self.using(scheduler or self.defaults.scheduler):
            for start in range(0, count, batch_size or max(count, 1)):
                part = slice(start, start + (batch_size or count))
                pictures.extend(render(*(None if value is None else value[part] for value in values)))
        return pictures

    @contextlib.contextmanager
    def using(self, scheduler: Any | None) -> Iterator[None]:
        """Run with another scheduler (by name: built from the present one's noise schedule), and put the old back."""
        usual = self.pipeline.scheduler
        if scheduler is not None:
            self.pipeline.scheduler = self._scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        try:
            yield
        finally:
            self.pipeline.scheduler = usual

    def _scheduler(self, name: str) -> Any:
        usual = self.pipeline.scheduler.config
        return self.own_schedulers[name](usual) if name in self.own_schedulers else scheduler_class(name).from_config(
            usual)


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler class; `ConfigError` names the nearest for an unknown one."""
    import diffusers

    names = [entry for entry in dir(diffusers) if entry.endswith("Scheduler") and entry != "Scheduler"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"Unknown scheduler {name!r}" + (f", did you mean {near[0]!r}?" if near else
                                                           ": give a diffusers scheduler class, e.g. DDIMScheduler."))
    return getattr(diffusers, name)


def need_folder(place: Path, advice: str) -> None:
    """Raises `CheckpointError` where there is no diffusers folder; the sentence ends with `advice`."""
    if not (place / "model_index.json").is_file():
        raise CheckpointError(f"{place}: there is no diffusion model here (no model_index.json): {advice}.")


def load_pipeline(place: Path, make: Callable[[list[str]], Any], optional: Sequence[str], what: str,
                  advice: str) -> Any:
    """A pipeline from a diffusers folder, without diffusers' progress bars and warnings.

    Args:
        make: from the names of the `optional` parts that the folder does not have, the pipeline.
        what: kind of folder, for the sentence.

    Raises:
        CheckpointError: not complete, or damaged.
    """
    from safetensors import SafetensorError

    try:
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        with quiet_loading("diffusers"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `torch_dtype` is the name every diffusers below 1 knows
            return make([name for name in optional if (index.get(name) or [None])[0] is None])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{place}: not a complete {what} folder ({reason}); {advice}.") from error


def one_each(generator: Generators, count: int) -> list[torch.Generator] | None:
    """One generator per picture: the first is the given one, the others are seeded from a copy of it.

    Raises:
        ConfigError: another number of generators than pictures.
    """
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        if len(generator) != count:
            raise ConfigError(f"{len(generator)} generators were given for {count} pictures.")
        return list(generator)
    copy = generator.clone_state()
    seeds = [int(torch.randint(2**62, (), generator=copy, device=copy.device)) for _ in range(1, count)]
    return [generator, *(torch.Generator(copy.device).manual_seed(seed) for seed in seeds)][:count]


def for_each(values: Tensor | None, count: int, name: str) -> Tensor | None:
    """`[B, …]` or `[1, …]` as `[B, …]`; `ConfigError` for another number of samples than pictures."""
    if values is None:
        return None
    if len(values) not in (1, count):
        raise ConfigError(f"{name} hold {len(values)} samples for {count} pictures.")
    return values.expand(count, *values.shape[1:])
