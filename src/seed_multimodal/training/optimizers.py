"""Optimizers: AdamW, the original's AdamW, Muon with AdamW; and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.schedules import peak_rate

MOMENTUM = 0.95  # of Muon
OUTER_PARTS = (
    "embed",
    "lm_head",
    "proj_out",
    "output_resampler",
)  # their matrices do not map between hidden spaces


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of trained parameters: weight decay on matrices, not on vectors (biases, norms)."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    module: nn.Module, settings: OptimSettings, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; `device`: on which it runs, None: that of the parameters.

    Raises ConfigError: none, or none with a prefix of `part_rates`."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("Nothing to train: every parameter is frozen.")
    if settings.name == "muon":
        return MuonWithAdamW(module, settings.learning_rate, settings.weight_decay)
    peak = peak_rate(settings)
    groups: list[dict[str, Any]] = []
    for part, rate in [*settings.part_rates.items(), ("", settings.learning_rate)]:
        own = [trained.pop(name) for name in list(trained) if name.startswith(part)]
        if part and not own:
            raise ConfigError(
                f"optim: part_rates: no trained parameter is named {part}{nearest(part, trained)}."
            )
        if not own:
            continue
        group = {"params": own, "weight_decay": settings.weight_decay}
        if settings.part_rates:
            group["lr_scale"] = rate / peak if peak else 0.0
        groups.append(group)
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.name == "adamw_hf":
        return AdamWHf(groups, settings.learning_rate, betas, settings.adam_epsilon)
    devices = {(device or p.device).type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=betas,
        eps=settings.adam_epsilon,
        fused=True if devices == {"cuda"} else None,
    )


class AdamWHf(torch.optim.Optimizer):
    """AdamW as `transformers.optimization.AdamW` 4.30.2 computed it.

    m and v as in Adam; `p -= lr · √(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + eps)`, and only then `p -= lr · weight_decay · p`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                state["step"] = count = int(state["step"]) + 1
                state["exp_avg"].lerp_(parameter.grad, 1.0 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(
                    parameter.grad, parameter.grad, value=1.0 - beta2
                )
                parameter.addcdiv_(
                    state["exp_avg"],
                    state["exp_avg_sq"].sqrt().add_(group["eps"]),
                    value=-lr * (1.0 - beta2**count) ** 0.5 / (1.0 - beta1**count),
                )
                if group["weight_decay"] > 0.0:
                    parameter.mul_(1.0 - lr * group["weight_decay"])


class MuonWithAdamW(torch.optim.AdamW):
    """Muon (Jordan 2024) for hidden matrices (the first group), AdamW for `OUTER_PARTS`, norms and biases. Muon's
    updates are scaled to AdamW's size, so both use one learning rate."""

    param_groups: list[dict[str, Any]]

    def __init__(self, module: nn.Module, lr: float, weight_decay: float) -> None:
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        inner = {
            name: p
            for name, p in trained
            if p.ndim == 2 and not any(part in name for part in OUTER_PARTS)
        }
        rest = [p for name, p in trained if name not in inner]
        super().__init__(
            [
                {"params": [*inner.values()], "weight_decay": weight_decay},
                *parameter_groups(rest, weight_decay),
            ],
            lr=lr,
            betas=(0.9, 0.99),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        muon, *others = self.param_groups
        for matrix in (p for p in muon["params"] if p.grad is not None):
            state = self.state[matrix]
            if not state:
                state |= {
                    "momentum": torch.zeros_like(matrix),
                    "step": torch.zeros(()),
                }  # AdamW loads any `step`
            momentum = state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
            update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
            matrix.mul_(1 - muon["lr"] * muon["weight_decay"])
            matrix.add_(update, alpha=-muon["lr"] * 0.2 * max(matrix.shape) ** 0.5)
        self.param_groups = others
        super().step()
        self.param_groups = [muon, *others]


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition, nearly, by five Newton–Schulz steps; in bfloat16 on CUDA only: CPUs
    without bfloat16 units multiply it eight times slower than float32."""
    wide = matrix.T if (tall := matrix.shape[0] > matrix.shape[1]) else matrix
    wide = (wide / wide.norm().clamp(min=1e-7)).to(
        torch.bfloat16 if matrix.is_cuda else torch.float32
    )
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(
            wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return wide.T if tall else wide


class Ema:
    """Exponential moving average of a module's parameters, in fp32."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            n: p.detach().clone().float() for n, p in modules.named_parameters() if p.requires_grad
        }

    def update(self, modules: nn.Module, step: int) -> None:
        """Update the average; the decay is lower in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = dict(modules.named_parameters())
        for name, average in self.shadow.items():
            average.lerp_(own[name].detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, modules: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        own = dict(modules.named_parameters())
        for name, average in self.shadow.items():
            own[name].copy_(average)
