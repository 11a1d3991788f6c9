"""LaVIT's stage 1 as a trainer task: token selector, token merger, codebook and decoder, from
images.

One run does both parts: `codebook_warmup` steps without codes, then k-means start and training with
codes. The log has `loss_cosine` (the original converged at 0.18), `kept`, `tokens` per image with
their spread, `codebook_used` and `perplexity`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from seed_multimodal.recipes.lavit.losses import LavitStage1
from seed_multimodal.training.codebook import CodebookHealth, CodebookTask
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.meters import Metrics
from seed_multimodal.training.optimizers import ParameterGroup, parameter_groups


class LavitTokenizerTask(CodebookTask):
    """Trains a `LavitStage1`.

    Args:
        batches: micro-step → this process's batch on the model's device, deterministic: normalized
            pixels `[B, 3, S, S]`, or features `[B, N, D]` of the frozen vision encoder.
    """

    model: LavitStage1

    def __init__(
        self,
        name: str,
        model: LavitStage1,
        settings: StageSettings,
        batches: Callable[[int], Tensor],
        health: CodebookHealth,
    ) -> None:
        self.draw = batches
        groups = stage1_groups(model, settings.weight_decay, selector_lr_scale=1.0)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
        super().__init__(name, model, settings, health, optimizer=optimizer)

    def batch(self, micro_step: int) -> Tensor:
        return self.draw(micro_step)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Metrics]:
        output = model(batch)
        return output.loss, output.metrics


def stage1_groups(
    model: LavitStage1, weight_decay: float, selector_lr_scale: float
) -> list[ParameterGroup]:
    """AdamW's parameter groups; those of the token selector are the last ones.

    selector_lr_scale: factor of the token selector's learning rate. At too high a rate it collapses
        to all or none before token merger and decoder are trained.
    """
    selector = set(model.tokenizer.token_predictor.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in selector]
    groups = parameter_groups(others, weight_decay)
    for group in parameter_groups(model.tokenizer.token_predictor.parameters(), weight_decay):
        groups.append({**group, "lr_scale": selector_lr_scale})
    return groups
