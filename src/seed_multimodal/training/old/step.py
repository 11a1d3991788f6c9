"""One optimiser step: micro-steps under autocast, gradients over all processes, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.old.distributed import micro_step_sync

Loss = Callable[[int], tuple[Tensor, Mapping[str, Any]]]

_SMALLEST_SCALE = 2.0**-20  # 36 overflows in a row from GradScaler's first value: not a passing one


class Stepper:
    """Makes steps in two halves, so that all processes can agree that a step is sound before weights move."""

    def __init__(self, name: str, modules: nn.Module, loss: Loss, optimiser: torch.optim.Optimizer,
                 settings: StageSettings, rate: Callable[[int], float], wrapped: nn.Module | None, rank: int) -> None:
        self.loss, self.optimiser, self.settings, self.rate = loss, optimiser, settings, rate
        self.wrapped, self.rank = wrapped, rank
        self.device = next(modules.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.trained = trained_parameters(name, modules, optimiser)

    def gradients(self, step: int) -> tuple[dict[str, float], str]:
        """Losses and gradients of one step; returns the numbers to log, and what is wrong with them ("": nothing)."""
        rate = self.rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        count = self.settings.accumulate
        values: list[Tensor] = []
        parts: dict[str, Any] = {}
        for micro in range(count):
            with micro_step_sync(self.wrapped, micro == count - 1):
                value, more = self._micro_step(step * count + micro)
            values.append(value.detach())
            for key, number in more.items():
                parts[key] = parts[key] + number if micro else number
        if count > 1:
            parts = {key: number / count for key, number in parts.items()}
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip or math.inf)
        mean = values[0] if count == 1 else torch.stack(values).mean()
        numbers = _read({"loss": mean, "grad": norm, "lr": rate, **parts})
        if self.scaler.is_enabled():
            numbers["loss_scale"] = self.scaler.get_scale()
        return numbers, self._problem(numbers)

    def update(self) -> None:
        """Move the weights; an fp16 step whose gradients overflowed is skipped and the loss scale halved."""
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def _micro_step(self, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        # Ranks differ by more than any number of micro-steps, so no two draw the same numbers.
        seed_generators(self.settings.seed * 1_000_003 + micro_step + self.rank * 1_000_003**2, self.device)
        dtype = torch.float16 if self.settings.precision == "fp16" else torch.bfloat16
        autocast = torch.autocast(self.device.type, dtype, self.settings.precision != "fp32")
        with _attention_kernel(self.device), autocast:
            value, parts = self.loss(micro_step)
        share = value if self.settings.accumulate == 1 else value / self.settings.accumulate
        self.scaler.scale(share).backward()
        return value, parts

    def _problem(self, numbers: Mapping[str, float]) -> str:
        if not math.isfinite(numbers["loss"]):
            return f"The loss became {numbers['loss']}"
        if self.scaler.is_enabled():
            return "" if self.scaler.get_scale() > _SMALLEST_SCALE else (
                "The fp16 gradients overflow at any loss scale (use bf16 or fp32)")
        return "" if math.isfinite(numbers["grad"]) else f"The gradient norm became {numbers['grad']}"


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of `device`.

    `torch.manual_seed` does the same for every kind of device that torch knows, and where one is not in use it notes
    the call stack each time: about 0.4 ms, as much as a small model's whole step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def trained_parameters(name: str, modules: nn.Module, optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The optimiser's parameters in the order of `modules`.

    Raises:
        ConfigError: the optimiser trains parameters outside `modules`, which no state would hold.
    """
    wanted = {id(p) for group in optimiser.param_groups for p in group["params"]}
    trained = [p for p in modules.parameters() if id(p) in wanted]
    if len(trained) < len(wanted):
        raise ConfigError(f"[{name}] the optimiser trains {len(wanted) - len(trained)} tensors that are not in the "
                          "trained modules, so they would not be saved.")
    return trained


def _read(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Numbers and scalar tensors as floats, with one transfer from the device (every transfer waits for it)."""
    tensors = {key: value.detach() for key, value in numbers.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device
    read = torch.stack([value.reshape(()).to(device, torch.float32) for value in tensors.values()]).tolist()
    known = dict(zip(tensors, read, strict=True))
    return {key: known[key] if key in known else float(value) for key, value in numbers.items()}


def _attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On CPUs plain matrix products: the backward pass of the fused bf16 kernel is several times slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
