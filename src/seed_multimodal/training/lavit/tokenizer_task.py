"""Stage 1 of LaVIT as a task of the loop: selector, merger, codebook and decoder from pictures alone.

    model = LavitStage1(DynamicTokenizer(config), CodeDecoder(sizes))
    task = LavitTokenizerTask("tokenizer", model, settings, batches, CodebookHealth(codebook_warmup=2000,
                              kmeans_start=True, restart_every=200))
    train_stage(task, "work")

One run does both halves: `codebook_warmup` steps without codes, then the codebook's start and training with it. The log
has what a plot needs: `loss_cosine` (see `lavit.training.REFERENCE`), `kept`, `tokens` of a picture with their spread,
`codebook_used` and `perplexity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.lavit.training import LavitStage1
from seed_multimodal.training.codebook import CodebookHealth, CodebookMaintenance, codebook_use, evaluation_mode
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.task import StageTask


class LavitTokenizerTask(StageTask):
    """Trains a `LavitStage1`.

    Args:
        batches: micro-step → this process's batch on the model's device, a function of its argument alone: normalised
            pixels `[B, 3, S, S]`, or features `[B, N, D]` that a frozen tower has given.
        health: when codes begin and dead ones move.
        selector_lr_scale: the selector's learning rate over that of all else. Too high a one lets it keep everything or
            nothing before merger and decoder have learnt anything from which it could tell.
    """

    def __init__(self, name: str, model: LavitStage1, settings: StageConfig, batches: Callable[[int], Tensor],
                 health: CodebookHealth | None = None, *, selector_lr_scale: float = 1.0) -> None:
        self.model, self.batches = model, batches
        self.codebook = CodebookMaintenance(model, health or CodebookHealth(), batches, settings.max_steps,
                                            settings.batch_size)
        groups = stage1_groups(model, settings.weight_decay, selector_lr_scale)
        super().__init__(name, self.codebook.counts, settings,
                         optimizer=torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99)))
        # Buffers are equal by construction, or (code counts) each process's own.
        self.ddp_options = {"broadcast_buffers": False, "find_unused_parameters": model.freeze_selector}
        self.latest: dict[str, Tensor] = {}

    @property
    def wrapped_part(self) -> nn.Module:
        """The model; `module` holds code counts beside it."""
        return self.model

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss of a batch, and its numbers."""
        step, inside = divmod(micro_step, self.settings.gradient_accumulation_steps)
        self.codebook.before(step, inside == 0)
        output = model(self.batches(micro_step))
        self.codebook.after_micro_step()
        self.latest = output.numbers()
        return output.loss, self.latest

    def after_step(self, step: int) -> None:
        """Dead codes move, when due."""
        self.codebook.after(step)

    def acts_after(self, step: int) -> bool:
        """At restarts of codes."""
        return self.codebook.restarts(step)

    def status(self) -> dict[str, float]:
        """The use of codes."""
        return self.codebook.status()

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing of its own; the counts of codes, which are saved with the module, are added up."""
        self.codebook.add_up()
        return {}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """The last step's numbers."""
        return {**super().finish(group), **{name: round(float(value), 4) for name, value in self.latest.items()}}


def stage1_groups(model: LavitStage1, weight_decay: float, selector_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained, the selector's with its own `lr_scale`, last.

    Raises:
        ConfigError: a scale that is not positive.
    """
    if not 0 < selector_lr_scale < float("inf"):
        raise ConfigError(f"selector_lr_scale must be a positive number, not {selector_lr_scale}.")
    selector = parameter_groups(model.tokenizer.token_predictor, weight_decay)
    own = {id(parameter) for group in selector for parameter in group["params"]}
    others = [{**group, "params": [parameter for parameter in group["params"] if id(parameter) not in own]}
              for group in parameter_groups(model, weight_decay)]
    return [*others, *({**group, "lr_scale": selector_lr_scale} for group in selector)]


@dataclass(frozen=True)
class Stage1Measures:
    """What a tokenizer does on held-out pictures.

    Attributes:
        cosine: mean over patches of 1 − cos(x, x̂). blind: the same if every picture were answered with the mean of
            all, patch by patch: what is reached without seeing anything.
        kept: share of the patches. tokens: of each picture, in order. usage: as of `codebook_use`, None without codes.
    """

    cosine: float
    blind: float
    kept: float
    tokens: list[int]
    usage: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """For a record: numbers, and the spread of the tokens in the place of their list."""
        count = torch.tensor(self.tokens, dtype=torch.float)
        spread = {"tokens": count.mean(), "tokens_deviation": count.std(correction=0), "tokens_least": count.min(),
                  "tokens_most": count.max()}
        codes = {} if self.usage is None else {
            "codebook_used": round(self.usage["codebook_used"], 4), "perplexity": round(self.usage["perplexity"], 1)}
        return {"cosine": round(self.cosine, 4), "blind": round(self.blind, 4), "kept": round(self.kept, 4),
                **{name: round(float(value), 2) for name, value in spread.items()}, **codes}


def measure(model: LavitStage1, batches: Iterable[Tensor], *, quantize: bool | None = None) -> Stage1Measures:
    """Measures over batches of pixels or features; the selector draws with a fixed seed in each batch.

    Raises:
        ConfigError: no batches.
    """
    counts, codes, features, losses = [], [], [], []
    with evaluation_mode(model):
        for batch in batches:
            found = model.patch_features(batch)
            output = model(found, quantize=quantize)
            features.append(found.cpu())
            losses.append(output.loss_cosine.cpu() * len(found))
            counts += output.counts_B.tolist()
            codes += [] if output.codes_T is None else [output.codes_T.cpu()]
    if not features:
        raise ConfigError("There is no picture to measure a tokenizer on.")
    whole = torch.cat(features)
    blind = 1 - F.cosine_similarity(whole, whole.mean(0, keepdim=True).expand_as(whole), dim=-1).mean()
    return Stage1Measures(float(sum(losses)) / len(whole), float(blind), sum(counts) / whole[..., 0].numel(), counts,
                          codebook_use(torch.cat(codes).bincount(minlength=model.quantize.size)) if codes else None)
