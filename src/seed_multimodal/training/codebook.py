"""Stages of models with a codebook: warm-up without codes, k-means start, restart of dead codes,
usage log.

Determined by (weights, step), so a resumed run repeats it. Codes are changed on rank 0 and
broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import evaluating
from seed_multimodal.settings import fraction, non_negative, positive
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.task import RunView, StageTask

USES_PER_CODE = 10  # mean number without which no code counts as dead


@dataclass
class CodebookHealth:
    """Schedule of codebook start and restarts; all off by default.

    Attributes:
        codebook_warmup: optimizer steps without codes.
        kmeans_start: initialize the codebook by k-means of features of at least `kmeans_images`
            images, or of the complete training set.
        restart_every: optimizer steps between restarts of dead codes (0: none); one is put off
            until codes were used `USES_PER_CODE` times on average since the last.
        restart_until: share of the run after which no codes are restarted.
    """

    codebook_warmup: int = non_negative(0)
    kmeans_start: bool = False
    kmeans_images: int = positive(2048)
    restart_every: int = non_negative(0)
    restart_until: float = fraction(0.8)


class Codebook:
    """Use of a model's codes: its statistics, restarts of dead codes, and numbers to log.

    since_restart, since_log: uses of each code by all processes since then, int64 `[K]`.
    """

    def __init__(self, model: Any, health: CodebookHealth, max_steps: int) -> None:
        is_fixed = model.quantize.is_fixed
        is_averaged = model.quantize.ema_decay is not None
        if is_fixed and (health.kmeans_start or health.restart_every or is_averaged):
            raise ConfigError(
                "kmeans_start, restart_every and ema_decay are for learned codes; those of fsq and "
                "lfq are fixed: leave all three out."
            )
        if health.codebook_warmup and not (health.kmeans_start or is_fixed):
            raise ConfigError("codebook_warmup needs kmeans_start: true.")
        if health.codebook_warmup >= max_steps:
            raise ConfigError(
                f"codebook_warmup ({health.codebook_warmup} steps) leaves none of the run's "
                f"{max_steps} steps for training with codes."
            )
        self.model = model
        self.health = health
        self.last_restart = health.restart_until * max_steps
        device = next(model.parameters()).device
        self.since_restart = torch.zeros(model.quantize.size, dtype=torch.long, device=device)
        self.since_log = self.since_restart.clone()

    def update(self, step: int) -> None:
        """Update the codebook after a step; restart dead codes from its last batch, when due."""
        uses = self.model.quantize.update()
        self.since_log += uses
        self.since_restart += uses

        # A code is dead if many features have missed it, whatever the number of steps.
        steps_with_codes = step - self.health.codebook_warmup
        every = self.health.restart_every
        is_due = every and steps_with_codes > 0 and steps_with_codes % every == 0
        is_due = is_due and step <= self.last_restart
        if is_due and self.since_restart.double().mean() >= USES_PER_CODE:
            self.model.quantize.restart(self.since_restart == 0, self.model.quantize.features)
            self.since_restart.zero_()

    def status(self) -> dict[str, float]:
        """Code usage since the last log line."""
        usage = codebook_use(self.since_log)
        self.since_log.zero_()
        return usage

    def state_dict(self) -> JsonObject:
        """Use counts of codes since the last restart of dead codes."""
        return {"since_restart": self.since_restart.tolist()}

    def load_state_dict(self, states: Sequence[JsonObject]) -> None:
        self.since_restart.copy_(torch.tensor(states[0]["since_restart"]))


class CodebookTask(StageTask):
    """A stage of a model with an optional codebook.

    The model has `codebook_points` (features of a batch to quantize, `[..., d]`, for the k-means
    start), `quantize` (a `VectorQuantizer`) and `use_codes` (whether codes are used yet).

    Args:
        health: a `CodebookHealth`, or settings with its fields.
        n_images: size of the training set; None: endless.
    """

    codebook: Codebook | None = None

    def __init__(
        self,
        name: str,
        model: nn.Module,
        settings: StageSettings,
        health: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        n_images: int | None = None,
    ) -> None:
        self.model: Any = model
        self.health = health
        self.n_images = n_images
        if hasattr(model, "codebook_points"):
            self.codebook = Codebook(model, health, settings.max_steps)
            self.parts = [self.codebook]
            self.after_step = self.codebook.update
        super().__init__(name, model, settings, optimizer=optimizer)
        self.ddp_options = {
            "broadcast_buffers": False,
            "find_unused_parameters": getattr(model, "skips_parameters", False),
        }

    def codebook_points(self, batch: Any) -> Tensor:
        """Features of a batch to quantize, `[..., d]`."""
        return self.model.codebook_points(batch)

    def batches(self, step: int) -> Sequence[Any]:
        """As the base's; the codebook starts at the end of the warm-up."""
        if self.codebook is not None:
            self.model.use_codes = step >= self.health.codebook_warmup
            if step == self.health.codebook_warmup and self.health.kmeans_start:
                self.start_codes()
        return super().batches(step)

    def start_codes(self) -> None:
        """Initialize the codebook by k-means of features of the run's first batches."""
        n_images = self.health.kmeans_images
        if self.n_images is not None:
            n_images = min(n_images, self.n_images)
        n_batches = math.ceil(n_images / self.settings.batch_size)
        # In fp32: k-means compares small distances.
        device = next(self.model.parameters()).device
        autocast = torch.autocast(device.type, enabled=False)
        with torch.no_grad(), evaluating(self.model), autocast:
            features = [self.codebook_points(self.batch(index)) for index in range(n_batches)]
            self.model.quantize.init_from(torch.cat(features).float())

    def finish(self, run: RunView) -> Mapping[str, object]:
        """With the metrics of the last step."""
        latest = {name: round(value, 6) for name, value in self.meter.metrics().items()}
        return {**super().finish(run), **latest}


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Use counts `[K]` → share of used codes and perplexity; empty if none was used."""
    if not counts.any():
        return {}
    entropy = torch.special.entr(counts.double() / counts.sum()).sum()  # in nats
    return {
        "codebook_used": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp()),
    }
