"""Optimizers: AdamW, the original's AdamW, Muon with AdamW; and the weights' moving average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import cpu_computes_bfloat16
from seed_multimodal.settings import nearest
from seed_multimodal.training.config import OptimSettings, StageSettings, check_schedule
from seed_multimodal.training.schedules import peak_rate

MUON_MOMENTUM = 0.95
ParameterGroup = dict[str, Any]  # `params` and hyperparameters, as in torch.optim
# Parts of names of matrices that do not map between hidden spaces.
OUTER_PARTS = ("embed", "lm_head", "proj_out", "output_resampler")


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[ParameterGroup]:
    """AdamW groups of trained parameters: weight decay on matrices, not on vectors."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def stage_optimizer(module: nn.Module, settings: StageSettings) -> torch.optim.Optimizer:
    """That of the settings, on all trained parameters; weight decay on matrices only."""
    if settings.optimizer == "muon":
        return MuonWithAdamW(module, settings.learning_rate, settings.weight_decay)
    groups = parameter_groups(module.parameters(), settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with a gradient, by name; tied ones once."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def build_optimizer(
    module: nn.Module, settings: OptimSettings, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters.

    device: on which it runs; None: that of the parameters.

    Raises ConfigError: no parameter is trained or has a prefix of `part_rates`, or a setting that
        optimizer or schedule do not read.
    """
    check_schedule(settings, "optim")
    trained = trained_parameters(module)
    if not trained:
        raise ConfigError("Nothing to train: every parameter is frozen.")
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.name == "muon":
        if settings.part_rates:
            raise ConfigError("optim: muon does not read part_rates; use adamw, or leave them out.")
        return MuonWithAdamW(
            module, settings.learning_rate, settings.weight_decay, betas, settings.adam_epsilon
        )

    # AdamW, with one group for each rate.
    groups = _rate_groups(trained, settings)
    if settings.name == "adamw_hf":
        return AdamWHf(groups, settings.learning_rate, betas, settings.adam_epsilon)
    devices = {(device or p.device).type for p in trained.values()}
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=betas,
        eps=settings.adam_epsilon,
        fused=True if devices <= {"cpu", "cuda"} else None,
    )


def _rate_groups(trained: Mapping[str, Tensor], settings: OptimSettings) -> list[ParameterGroup]:
    """A group for each prefix of `part_rates`, and one for all other parameters.

    `lr_scale` is a group's rate over the peak of the schedule. Raises ConfigError: no parameter has
    a prefix.
    """
    peak = peak_rate(settings)
    decay = settings.weight_decay
    if not settings.part_rates:
        return [{"params": list(trained.values()), "weight_decay": decay}]

    groups: list[ParameterGroup] = []
    others = dict(trained)  # those that no prefix has matched yet
    for prefix, rate in {**settings.part_rates, "": settings.learning_rate}.items():
        params = [others.pop(name) for name in list(others) if name.startswith(prefix)]
        if params:
            lr_scale = rate / peak if peak else 0.0
            groups.append({"params": params, "weight_decay": decay, "lr_scale": lr_scale})
        elif prefix:
            raise ConfigError(
                "optim: part_rates: no trained parameter is named "
                f"{prefix}{nearest(prefix, others)}."
            )
    return groups


class AdamWHf(torch.optim.Optimizer):
    """AdamW as `transformers.optimization.AdamW` 4.30.2 computed it.

    m and v as in Adam; `p -= lr · √(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + eps)`, and only then
    `p -= lr · weight_decay · p`.
    """

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            lr = group["lr"]
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = int(state["step"]) + 1
                step = state["step"]

                # First and second moment.
                state["exp_avg"].lerp_(grad, 1.0 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)

                # The update, then decay of the updated weights.
                denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
                step_size = lr * (1.0 - beta2**step) ** 0.5 / (1.0 - beta1**step)
                parameter.addcdiv_(state["exp_avg"], denominator, value=-step_size)
                if group["weight_decay"] > 0.0:
                    parameter.mul_(1.0 - lr * group["weight_decay"])


class MuonWithAdamW(torch.optim.AdamW):
    """Muon (Jordan 2024) for hidden matrices (the first group), AdamW for `OUTER_PARTS`, norms and
    biases.

    Muon's updates are scaled to AdamW's size, so both use one learning rate.
    """

    param_groups: list[ParameterGroup]

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        """betas, eps: of AdamW."""
        hidden: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in trained_parameters(module).items():
            is_outer = any(part in name for part in OUTER_PARTS)
            if parameter.ndim == 2 and not is_outer:
                hidden.append(parameter)
            else:
                others.append(parameter)
        groups = [{"params": hidden, "weight_decay": weight_decay}]
        groups += parameter_groups(others, weight_decay)
        super().__init__(groups, lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        muon, *others = self.param_groups
        for matrix in muon["params"]:
            grad = matrix.grad
            if grad is None:
                continue
            state = self.state[matrix]
            if not state:
                state["momentum"] = torch.zeros_like(matrix)
                state["step"] = torch.zeros(())  # AdamW expects it when it loads a state

            # Nesterov momentum, orthogonalized; 0.2 · √size gives it the usual size of AdamW's
            # updates.
            momentum = state["momentum"].lerp_(grad, 1 - MUON_MOMENTUM)
            update = orthogonal(grad.lerp(momentum, MUON_MOMENTUM))
            matrix.mul_(1 - muon["lr"] * muon["weight_decay"])
            matrix.add_(update, alpha=-muon["lr"] * 0.2 * max(matrix.shape) ** 0.5)

        # AdamW updates the other groups.
        self.param_groups = others
        super().step()
        self.param_groups = [muon, *others]


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition, nearly, by five Newton–Schulz steps.

    In bfloat16 on CUDA, and on CPUs with instructions for it; others multiply it eight times slower
    than float32.
    """
    in_half = matrix.is_cuda or (matrix.device.type == "cpu" and cpu_computes_bfloat16())
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    wide = wide.to(torch.bfloat16 if in_half else torch.float32)
    for _ in range(5):
        # a X + (b A + c A²) X with A = X Xᵀ and (a, b, c) = (3.4445, -4.7750, 2.0315)
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, polynomial, wide, beta=3.4445)
    return wide.T if is_tall else wide


class Ema:
    """Exponential moving average of a module's trained parameters, in fp32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone().float()
            for name, parameter in trained_parameters(module).items()
        }

    def update(self, module: nn.Module, step: int) -> None:
        """Update the average; the decay is lower in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters(module).items():
            self.shadow[name].lerp_(parameter.detach().float(), 1.0 - decay)

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters that are averaged."""
        return {name: module.get_parameter(name) for name in self.shadow}

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the averages and the module's parameters, which are trained in fp32."""
        for name, parameter in self.parameters(module).items():
            average = self.shadow[name]
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


@contextmanager
def averaged_weights(ema: Ema | None, module: nn.Module) -> Iterator[None]:
    """Context in which a module has its averaged weights, if there are any."""
    if ema is not None:
        ema.swap(module)
    try:
        yield
    finally:
        if ema is not None:
            ema.swap(module)
