"""Optimisers: AdamW by groups, the original's AdamW, and Muon beside AdamW; which one, and its rate, by settings.

The original's weight decay reaches everything that is trained, RMSNorm gains and embeddings included (its norm class
is unknown to transformers' filter), so there is one group by default. Its `adamw_hf` was removed from transformers and
is here again: decay after the step instead of before it, and epsilon beside the uncorrected second moment.

Muon (Jordan 2024; `torch.optim.Muon`) orthogonalises the momentum of each hidden matrix. Embeddings, heads, norms and
biases are not maps between hidden spaces and stay with AdamW; so does SEED-X's output resampler, whose attention Muon
sharpens slowly. Its steps are scaled to AdamW's size, so both parts take one learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest, setting
from seed_multimodal.training.schedules import KINDS, check_kind, scheduled_rate, warmup_count

OUTER_PARTS = ("embed", "lm_head", "proj_out", "output_resampler")


@dataclass
class OptimSettings:
    """The optimiser and its rate; the defaults are the published pretraining recipe.

    Attributes:
        name: adamw (torch, fused on CUDA), adamw_hf (the original's) or muon (matrices by Muon, the rest by AdamW;
            plain engine only; its AdamW part has betas 0.9 and 0.99 and spares norms).
        part_rates: highest rate of parameters whose names begin so, where it is not `learning_rate` (names as in
            `Task.module`; LaVIT: `{causal_encoder: 1.0e-4, vit_proj: 1.0e-4}`). Not with muon.
        decay: `all`: weight decay on everything trained, as released; `matrices`: not on norms and biases.
        lr_scheduler_type: a name of transformers' `SchedulerType`, see `schedules`; lr_scheduler_kwargs: its options.
        warmup_steps: used instead of `warmup_ratio` (rounded up) if above 0.
        min_lr_ratio: the last step's rate over the highest.
        schedule_per_micro_batch: as in SEED-X, see `schedules.scheduled_rate`.
    """

    name: str = setting("adamw", choices=("adamw", "adamw_hf", "muon"))
    learning_rate: float = setting(1.5e-4, least=0)
    part_rates: dict[str, float] = setting(factory=dict)
    adam_beta1: float = setting(0.9, least=0, below=1)
    adam_beta2: float = setting(0.95, least=0, below=1)
    adam_epsilon: float = setting(1e-5, least=0, most=1)
    weight_decay: float = setting(0.05, least=0)
    decay: str = setting("all", choices=("all", "matrices"))
    lr_scheduler_type: str = setting("cosine", choices=KINDS)
    lr_scheduler_kwargs: dict[str, Any] = setting(factory=dict)
    warmup_ratio: float = setting(0.03, least=0, most=1)
    warmup_steps: int = setting(0, least=0)
    min_lr_ratio: float = setting(0.05, least=0, most=1)
    schedule_per_micro_batch: bool = False

    def __post_init__(self) -> None:
        if self.lr_scheduler_type in KINDS:  # others are refused where settings are read
            check_kind(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        wrong = next((name for name, rate in self.part_rates.items() if not rate >= 0), None)
        if wrong is not None:
            raise ConfigError(f"optim: part_rates: {wrong}: must be 0 or more, not {self.part_rates[wrong]!r}.")
        if self.part_rates and (self.name == "muon" or not self.learning_rate):
            raise ConfigError("optim: part_rates need a learning_rate above 0 and cannot be used with muon.")


def schedule(step: int, settings: OptimSettings, max_steps: int, accumulate: int = 1) -> float:
    """Learning rate of optimiser step `step` (0-based) of `max_steps`, of `accumulate` micro-batches each."""
    micro = accumulate if settings.schedule_per_micro_batch else 1
    return scheduled_rate(
        settings.lr_scheduler_type, step, settings.learning_rate, max_steps, floor=settings.min_lr_ratio,
        warmup=warmup_count(max_steps, settings.warmup_ratio, settings.warmup_steps), micro_batches=micro,
        clamp=not settings.schedule_per_micro_batch, options=settings.lr_scheduler_kwargs)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, vectors (biases, norms) do not; frozen parameters are left out."""
    return _by_decay([p for p in module.parameters() if p.requires_grad], weight_decay)


def _by_decay(trained: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


def trained_groups(module: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """The optimiser's groups of what is trained in `module`, each parameter once; empty groups are left out.

    Raises:
        ConfigError: `part_rates` of a part that is not trained.
    """
    groups: list[dict[str, Any]] = []
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for part, rate in [*settings.part_rates.items(), (None, None)]:
        own = [trained.pop(name) for name in list(trained) if part is None or name.startswith(part)]
        if part is not None and not own:
            raise ConfigError(f"optim: part_rates: nothing that is trained is called {part}{nearest(part, trained)}.")
        scale = {} if rate is None else {"lr_scale": rate / settings.learning_rate}
        if settings.decay == "matrices":
            groups += [{**group, **scale} for group in _by_decay(own, settings.weight_decay)]
        else:
            groups.append({"params": own, "weight_decay": settings.weight_decay, **scale})
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer | MuonWithAdamW:
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
        """Update every parameter that has a gradient; returns what `closure` returns."""
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


class MuonWithAdamW:
    """Behaves as a `torch.optim.Optimizer` towards training loops: `param_groups`, `step`, `zero_grad`, states.

    Args:
        module: whose trainable parameters are optimised.
        outer: names that contain one of these stay with AdamW although they are matrices.
    """

    def __init__(self, module: nn.Module, lr: float, weight_decay: float, outer: Sequence[str] = OUTER_PARTS) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim == 2 and not any(part in name for part in outer)]
        taken = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in taken]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(
                [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
                 {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.99))}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both parts."""
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
        """States of both parts by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; another optimiser's state is a `ValueError`."""
        if set(state) != set(self.parts):
            raise ValueError(f"it holds {', '.join(state)} instead of {', '.join(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
