"""Optimisers of the language model and their learning rates.

What: `OptimSettings` (keys as on the original's command line), `build_optimizer`, `schedule`.
Peculiar: the original's weight decay reaches EVERYTHING that is trained, RMSNorm gains and embeddings included (its
norm class is unknown to transformers' filter); so there is one group. Its `adamw_hf` was removed from transformers and
is here again: decay after the step instead of before it, and epsilon beside the uncorrected second moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.optimizers import MuonWithAdamW
from seed_multimodal.training.schedules import KINDS, parameter_groups, scheduled_rate, warmup_count

NAMES = ("adamw", "adamw_hf", "muon")
DECAYS = ("all", "matrices")
Optimizer = torch.optim.Optimizer | MuonWithAdamW


@dataclass
class OptimSettings:
    """The optimiser and its rate; the defaults are the published pretraining recipe.

    Attributes:
        name: adamw (torch, fused on CUDA), adamw_hf (the original's) or muon (matrices by Muon, the rest by AdamW;
            plain engine only; its AdamW part has betas 0.9 and 0.99 and spares norms).
        decay: `all`: weight decay on everything trained, as released; `matrices`: not on norms and biases.
        warmup_steps: used instead of `warmup_ratio` (rounded up) if above 0.
        min_lr_ratio: the last step's rate over the highest.
        schedule_per_micro_batch: SEED-X's habit, see `schedules.scheduled_rate`.
    """

    name: str = "adamw"
    learning_rate: float = 1.5e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.05
    decay: str = "all"
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    min_lr_ratio: float = 0.05
    schedule_per_micro_batch: bool = False


def read_optim(config: Mapping[str, Any], where: str = "optim") -> OptimSettings:
    """`OptimSettings` of a mapping.

    Raises:
        ConfigError: a key that is unknown (the nearest is named), of the wrong type or out of range.
    """
    from seed_multimodal.training.llm.trainer_settings import from_mapping

    settings = from_mapping(OptimSettings, config, where)
    for key, options in (("name", NAMES), ("decay", DECAYS), ("lr_scheduler_type", KINDS)):
        if getattr(settings, key) not in options:
            raise ConfigError(f"{where}: {key} must be one of {', '.join(options)}, not {getattr(settings, key)!r}.")
    for key, low, high in (("learning_rate", 0, float("inf")), ("weight_decay", 0, float("inf")),
                           ("adam_epsilon", 0, 1), ("adam_beta1", 0, 0.9999999), ("adam_beta2", 0, 0.9999999),
                           ("warmup_ratio", 0, 1), ("warmup_steps", 0, float("inf")), ("min_lr_ratio", 0, 1)):
        if not low <= getattr(settings, key) <= high:
            raise ConfigError(f"{where}: {key} must be between {low} and {high:g}, not {getattr(settings, key)}.")
    return settings


def schedule(step: int, settings: OptimSettings, max_steps: int, accumulate: int = 1) -> float:
    """Learning rate of optimiser step `step` (0-based) of `max_steps`, of `accumulate` micro-batches each."""
    micro = accumulate if settings.schedule_per_micro_batch else 1
    return scheduled_rate(
        settings.lr_scheduler_type, step, settings.learning_rate, max_steps, floor=settings.min_lr_ratio,
        warmup=warmup_count(max_steps, settings.warmup_ratio, settings.warmup_steps), micro_batches=micro,
        clamp=not settings.schedule_per_micro_batch)


def trained_groups(module: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """The optimiser's groups of what is trained in `module`, each parameter once; empty groups are left out."""
    if settings.decay == "matrices":
        groups = parameter_groups(module, settings.weight_decay)
    else:
        groups = [{"params": [p for p in module.parameters() if p.requires_grad],
                   "weight_decay": settings.weight_decay}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, settings: OptimSettings) -> Optimizer:
    """The optimiser of everything in `module` that is trained.

    Raises:
        ConfigError: nothing is trained.
    """
    groups = trained_groups(module, settings)
    if not groups:
        raise ConfigError("There is nothing to train: every parameter is frozen.")
    if settings.name == "muon":
        return MuonWithAdamW(module, settings.learning_rate, settings.weight_decay)
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.name == "adamw_hf":
        return AdamWHf(groups, settings.learning_rate, betas, settings.adam_epsilon)
    cuda = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon,
                             fused=True if cuda else None)


class AdamWHf(torch.optim.Optimizer):
    """AdamW as `transformers.optimization.AdamW` 4.30.2 computed it (`optim=adamw_hf`).

    m and v as in Adam; `p -= lr · √(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + eps)`, and only then `p -= lr · weight_decay · p`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype, self._advance(parameter)].append(parameter)
            for (_, _, count), parameters in alike.items():
                self._move(parameters, count, group)
        return loss

    def _advance(self, parameter: Tensor) -> int:
        """Count the step of one parameter, starting its moments at the first."""
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] = int(state["step"]) + 1
        return state["step"]

    def _move(self, parameters: list[Tensor], count: int, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        gradients = [p.grad for p in parameters]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
        size = torch._foreach_sqrt(second)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_addcdiv_(parameters, first, size, -lr * (1.0 - beta2**count) ** 0.5 / (1.0 - beta1**count))
        if group["weight_decay"] > 0.0:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
