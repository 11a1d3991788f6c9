"""Optimizers: AdamW, the original's AdamW, and Muon with AdamW; learning rate schedules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest, setting
from seed_multimodal.training.config import SCHEDULES
from seed_multimodal.training.schedules import scheduled_rate, warmup_count

OUTER_PARTS = ("embed", "lm_head", "proj_out", "output_resampler")  # their matrices do not map between hidden spaces


@dataclass
class OptimSettings:
    """Optimizer and learning rate; defaults are the published pretraining recipe, with weight decay on all trained
    parameters, including norms and embeddings.

    Attributes:
        name: adamw (torch, fused on CUDA), adamw_hf (the original's) or muon (see `MuonWithAdamW`; not with DeepSpeed).
        part_rates: peak rate by parameter name prefix, instead of `learning_rate` (names as in `Task.module`; LaVIT:
            `{causal_encoder: 1.0e-4, vit_proj: 1.0e-4}`). Not with muon.
        warmup_steps: if above 0, replaces `warmup_ratio` (rounded up).
        min_lr_ratio: the last step's rate over the peak.
        schedule_per_micro_batch: as in SEED-X, see `schedules.scheduled_rate`.
    """

    name: str = setting("adamw", choices=("adamw", "adamw_hf", "muon"))
    learning_rate: float = setting(1.5e-4, least=0)
    part_rates: dict[str, float] = setting(factory=dict)
    adam_beta1: float = setting(0.9, least=0, below=1)
    adam_beta2: float = setting(0.95, least=0, below=1)
    adam_epsilon: float = setting(1e-5, least=0, most=1)
    weight_decay: float = setting(0.05, least=0)
    lr_scheduler_type: str = setting("cosine", choices=SCHEDULES)
    warmup_ratio: float = setting(0.03, least=0, most=1)
    warmup_steps: int = setting(0, least=0)
    min_lr_ratio: float = setting(0.05, least=0, most=1)
    schedule_per_micro_batch: bool = False


def schedule(step: int, settings: OptimSettings, max_steps: int, accumulate: int = 1) -> float:
    """Learning rate of optimizer step `step` (0-based) of `max_steps`, of `accumulate` micro-batches each."""
    by_micro_batch = settings.schedule_per_micro_batch
    return scheduled_rate(
        settings.lr_scheduler_type, step, settings.learning_rate, max_steps, floor=settings.min_lr_ratio,
        warmup=warmup_count(max_steps, settings.warmup_ratio, settings.warmup_steps), clamp=not by_micro_batch,
        micro_batches=accumulate if by_micro_batch else 1)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of trained parameters: weight decay on matrices, not on vectors (biases, norms)."""
    return _by_decay([p for p in module.parameters() if p.requires_grad], weight_decay)


def _by_decay(trained: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer of the trained parameters. Raises ConfigError: none, or none with a prefix of `part_rates`."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("Nothing to train: every parameter is frozen.")
    if settings.name == "muon":
        return MuonWithAdamW(module, settings.learning_rate, settings.weight_decay)
    groups: list[dict[str, Any]] = []
    for part, rate in [*settings.part_rates.items(), ("", settings.learning_rate)]:
        own = [trained.pop(name) for name in list(trained) if name.startswith(part)]
        if part and not own:
            raise ConfigError(f"optim: part_rates: no trained parameter is named {part}{nearest(part, trained)}.")
        scale = {"lr_scale": rate / settings.learning_rate} if part else {}
        groups += [{"params": own, "weight_decay": settings.weight_decay, **scale}] if own else []
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.name == "adamw_hf":
        return AdamWHf(groups, settings.learning_rate, betas, settings.adam_epsilon)
    cuda = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon,
                             fused=True if cuda else None)


class AdamWHf(torch.optim.Optimizer):
    """AdamW as `transformers.optimization.AdamW` 4.30.2 computed it.

    m and v as in Adam; `p -= lr · √(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + eps)`, and only then `p -= lr · weight_decay · p`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(parameter),
                              "exp_avg_sq": torch.zeros_like(parameter)}
                state["step"] = count = int(state["step"]) + 1
                state["exp_avg"].lerp_(parameter.grad, 1.0 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]),
                                   value=-lr * (1.0 - beta2**count) ** 0.5 / (1.0 - beta1**count))
                if group["weight_decay"] > 0.0:
                    parameter.mul_(1.0 - lr * group["weight_decay"])


class MuonWithAdamW:
    """Muon (Jordan 2024; `torch.optim.Muon`) for hidden matrices, AdamW for `OUTER_PARTS`, norms and biases. Muon's
    updates are scaled to AdamW's size, so both use one learning rate."""

    def __init__(self, module: nn.Module, lr: float, weight_decay: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        inner = {name: p for name, p in trained if p.ndim == 2 and not any(part in name for part in OUTER_PARTS)}
        rest = [p for name, p in trained if name not in inner]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(inner.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(_by_decay(rest, weight_decay), lr=lr, betas=(0.9, 0.99))}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both optimizers."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of both optimizers by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises KeyError: another optimizer's state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
