"""Codebook health in training: warm-up without codes, k-means start, restart of dead codes, usage for the log.

All of it is a function of (weights, step), so a killed run repeats it; the counts since the last restart are kept in
the state (`CodeCounts`). Codes are changed on rank 0 and broadcast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.quantizer import VectorQuantizer, add_counts
from seed_multimodal.settings import setting
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.task import StageTask


@dataclass
class CodebookHealth:
    """When a run's codes begin and move; everything is off by default.

    Attributes:
        codebook_warmup: optimiser steps without codes. kmeans_start: the codebook starts at k-means centres of
            features of at least `kmeans_images` pictures. restart_every: optimiser steps between restarts of dead
            codes (0: none), up to the share `restart_until` of the run.
    """

    codebook_warmup: int = setting(0, least=0)
    kmeans_start: bool = False
    kmeans_images: int = setting(2048, least=1)
    restart_every: int = setting(0, least=0)
    restart_until: float = setting(0.8, least=0, most=1)


class CodedModel(Protocol):
    """What `CodebookMaintenance` needs of the model, an `nn.Module`.

    Attributes:
        use_codes: whether codes are used yet. codes: those of the last batch, None without.
        features: those of the last batch, before the quantiser, `[..., d]`.
    """

    use_codes: bool
    codes: Tensor | None
    features: Tensor | None

    @property
    def quantize(self) -> VectorQuantizer: ...

    def codebook_points(self, batch: Any) -> Tensor:
        """Features of a batch that the codebook quantises, `[..., d]`, for its k-means start."""


class CodeCounts(nn.Module):
    """The model and, beside it in the saved state, how often each code was chosen since the last restart of dead
    codes, over all processes."""

    since_restart: Tensor

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer("since_restart", torch.zeros(size, dtype=torch.long, device=device))


class CodebookMaintenance:
    """Codebook steps before and after each optimiser step, by the options.

    Args:
        model: a `CodedModel`.
        options: a `CodebookHealth`, or settings with its fields.
        batch_at: micro-step → batch on the model's device, for the k-means start.
        steps: optimiser steps of the whole run.
    """

    def __init__(self, model: Any, options: Any, batch_at: Callable[[int], Mapping[str, Any] | Tensor], steps: int,
                 images_per_batch: int) -> None:
        self.model, self.options, self.batch_at = model, options, batch_at
        self.steps, self.images_per_batch = steps, images_per_batch
        self.counts = CodeCounts(model, model.quantize.size)
        self.since_log = torch.zeros_like(self.counts.since_restart)
        self.uncounted = torch.zeros_like(self.counts.since_restart)
        if self.options.codebook_warmup and not self.options.kmeans_start:
            raise ConfigError("codebook_warmup trains without codes first, so it needs kmeans_start: true.")
        if self.options.codebook_warmup >= steps:
            raise ConfigError(f"codebook_warmup ({self.options.codebook_warmup} steps) leaves none of the run's "
                              f"{steps} steps for training with codes.")

    def before(self, step: int, first_micro_step: bool) -> None:
        """At the start of a (micro) step: switch codes on when the warm-up is over, at their k-means start."""
        self.model.use_codes = step >= self.options.codebook_warmup
        if first_micro_step and step == self.options.codebook_warmup and self.options.kmeans_start:
            self.kmeans()

    def after_micro_step(self) -> None:
        """Count the batch's codes of this process, on its device: nothing waits for it."""
        if self.model.codes is not None:
            add_counts(self.uncounted, self.model.codes)

    def add_up(self) -> None:
        """Add the processes' counts; all must call it: before a log line, a checkpoint, a restart of codes."""
        if dist.is_initialized():
            dist.all_reduce(self.uncounted)
        self.counts.since_restart += self.uncounted
        self.since_log += self.uncounted
        self.uncounted.zero_()

    def after(self, step: int) -> None:
        """After an optimiser step: move dead codes onto features of the last batch, when due."""
        if not self.restarts(step):
            return
        self.add_up()
        self.model.quantize.restart(self.counts.since_restart < 1, self.model.features)
        self.counts.since_restart.zero_()

    def restarts(self, step: int) -> bool:
        """Whether codes are moved after this step."""
        every, past = self.options.restart_every, step - self.options.codebook_warmup
        return every > 0 and past > 0 and past % every == 0 and step <= self.options.restart_until * self.steps

    def kmeans(self) -> None:
        """Start the codebook at k-means centres of the features of the run's first batches."""
        device = next(self.model.parameters()).device.type
        with evaluation_mode(self.model), torch.autocast(device, enabled=False):
            features = [self.model.codebook_points(self.batch_at(number))
                        for number in range(max(1, -(-self.options.kmeans_images // self.images_per_batch)))]
            self.model.quantize.init_from(torch.cat(features).float())

    def status(self) -> dict[str, float]:
        """Codes used since the last log line, as a share, and their perplexity."""
        self.add_up()
        use = codebook_use(self.since_log)
        self.since_log.zero_()
        return use


def codebook_use(counts: Tensor) -> dict[str, float]:
    """How often each code was chosen `[K]` → the share of codes that were, and their perplexity; empty if none was."""
    if not counts.any():
        return {}
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()  # in nats
    return {"codebook_used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode before is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class CodebookTask(StageTask):
    """A stage of a model that may have a codebook (a `CodedModel`), kept healthy by `health`, a `CodebookHealth` or
    settings with its fields."""

    def __init__(self, name: str, model: nn.Module, settings: StageConfig, health: Any, *, optimizer: Any = None
                 ) -> None:
        self.model = model
        self.codebook = CodebookMaintenance(model, health, self.batch, settings.max_steps, settings.batch_size
                                            ) if hasattr(model, "codebook_points") else None
        super().__init__(name, self.codebook.counts if self.codebook else model, settings, optimizer=optimizer)
        # Buffers are equal by construction, or (code counts) each process's own.
        self.ddp_options = {"broadcast_buffers": False,
                            "find_unused_parameters": getattr(model, "skips_parameters", False)}

    @property
    def wrapped_part(self) -> nn.Module:
        """The model; `module` may hold code counts beside it."""
        return self.model

    def batch(self, micro_step: int) -> Any:
        """This process's batch on the model's device, a function of its argument alone."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss of a batch, and its numbers."""
        raise NotImplementedError

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss, with the codebook's maintenance before and after it."""
        step, inside = divmod(micro_step, self.settings.gradient_accumulation_steps)
        if self.codebook is not None:
            self.codebook.before(step, inside == 0)
        found = self.loss(model, self.batch(micro_step))
        if self.codebook is not None:
            self.codebook.after_micro_step()
        return found

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """Dead codes move, when due."""
        if self.codebook is not None:
            self.codebook.after(step)
        return None

    def status(self) -> dict[str, float]:
        """The use of codes."""
        return self.codebook.status() if self.codebook is not None else {}

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing of its own; the counts of codes, which are saved with the module, are added up."""
        if self.codebook is not None:
            self.codebook.add_up()
        return {}
