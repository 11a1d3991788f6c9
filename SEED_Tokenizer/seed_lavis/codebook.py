"""Codebook health in training: warm-up without codes, k-means start, restart of dead codes, usage for the log.

All of it is a function of (weights, step), so a killed run repeats it; the counts since the last restart are kept in
the state (`CodeCounts`). Codes are changed on rank 0 and broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seed_lavis.base import evaluation_mode, qformer_sizes, vit_sizes
from seed_lavis.options import CodebookOptions
from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.quantizer import CodebookUsage, add_counts


class CodebookMixin:
    """State of stage-2 models for `CodebookMaintenance`: the codes of the last batch, whether codes are used yet."""

    options: CodebookOptions
    use_codes = True
    codes: Tensor | None = None
    features: Tensor | None = None

    def prepare_codebook(self) -> None:
        """A moving-average codebook changes without gradient: it counts as trained, so that it is saved."""
        if self.options.ema_decay is not None:
            self.quantize.embedding.weight.requires_grad_(True)  # type: ignore[attr-defined]

    @property
    def skips_parameters(self) -> bool:
        """Whether some trained parameters get no gradient in some steps (an option of DistributedDataParallel)."""
        return self.options.ema_decay is not None or self.options.codebook_warmup > 0

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """As the library's, with the tower in `vit_precision`."""
        if vit_features is None:
            with torch.no_grad():
                vit_features = self.tower(images)  # type: ignore[attr-defined]
        return super().encoder_output(None, vit_features)  # type: ignore[misc]

    def note_codes(self, pre_quant: Tensor, indices: Tensor | None) -> None:
        """Keep the last batch's codes and features."""
        self.features, self.codes = pre_quant.detach().float(), indices


def stage2_sizes(options: CodebookOptions) -> dict[str, Any]:
    """Sizes in the configurations of both stage-2 models."""
    return {"vit": vit_sizes(options), "qformer": qformer_sizes(options), "num_query": options.num_query_token,
            "codebook_size": options.n_embed, "codebook_dim": options.codebook_embed_dim,
            "decode_depth": options.decode_depth, "decode_heads": options.decode_heads,
            "reverse_depth": options.reverse_depth, "normalize_codes": options.normalize_codes,
            "codebook_sections": options.codebook_sections}


def stage2_training(options: CodebookOptions) -> dict[str, Any]:
    """Options of the training that both stage-2 models take, besides loss weights and targets."""
    return {name: getattr(options, name) for name in ("freeze_qformer", "frozen_dropout", "corrupt", "nested",
                                                      "ema_decay")}


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
        batch_at: micro-step → batch on the model's device, for the k-means start.
        steps: optimiser steps of the whole run.
    """

    def __init__(self, model: Any, batch_at: Callable[[int], Mapping[str, Any]], steps: int,
                 images_per_batch: int) -> None:
        self.model, self.options, self.batch_at = model, model.options, batch_at
        self.steps, self.images_per_batch = steps, images_per_batch
        self.counts = CodeCounts(model, model.quantize.size)
        self.since_log = torch.zeros_like(self.counts.since_restart)
        self.uncounted = torch.zeros_like(self.counts.since_restart)
        if self.options.codebook_warmup and not self.options.kmeans_start:
            raise ConfigError("model.codebook_warmup trains without codes first, so it needs model.kmeans_start: true.")
        if self.options.codebook_warmup >= steps:
            raise ConfigError(f"model.codebook_warmup ({self.options.codebook_warmup} steps) leaves none of the run's "
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
        first = not dist.is_initialized() or dist.get_rank() == 0
        counts = self.model.quantize.counts  # its own are lost with the process; `restart_dead` adds up all processes'
        counts.copy_(self.counts.since_restart if first else torch.zeros_like(counts))
        self.model.quantize.restart_dead(self.model.features)
        self.counts.since_restart.zero_()

    def restarts(self, step: int) -> bool:
        """Whether codes are moved after this step."""
        every, past = self.options.restart_every, step - self.options.codebook_warmup
        return every > 0 and past > 0 and past % every == 0 and step <= self.options.restart_until * self.steps

    def kmeans(self) -> None:
        """Start the codebook at k-means centres of the features of the run's first batches."""
        with evaluation_mode(self.model), torch.autocast(self.model.device.type, enabled=False):
            features = [self.model.pre_quant_from_features(self.model.encoder_output(self.batch_at(number)["image"]))
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
    usage = CodebookUsage.of_counts(counts)
    return {"codebook_used": usage.fraction, "perplexity": usage.perplexity} if usage.used else {}
