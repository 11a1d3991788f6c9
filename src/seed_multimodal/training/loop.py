"""The restartable training loop that every nano stage runs through.

A stage is modules, a loss of (step) and an evaluation. Sample order and augmentation are functions of (seed, step),
so a run killed at any step and started again continues with the same numbers; the state on disk (weights, EMA
weights, optimiser, step) is replaced atomically. Peculiar: losses are computed under bf16 autocast with fp32
master weights on every device, which on recent CPUs is about twice as fast as fp32.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import assign_strictly


@dataclass
class StageSettings:
    """How long and how fast one stage trains; `steps` counts optimiser steps of `batch_size` samples.

    `start` is the `NAME.state.pt` of an earlier run whose weights (not its optimiser) the first step starts from.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    min_lr_ratio: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "bf16"
    seed: int = 0
    save_seconds: float = 60.0
    log_every: int = 50
    start: str = ""


def learning_rate(step: int, settings: StageSettings) -> float:
    """Linear warm-up, then cosine from `lr` to `lr · min_lr_ratio` at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


class Ema:
    """Exponential moving average of a module's parameters, kept in fp32 beside it."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {n: p.detach().clone().float() for n, p in modules.named_parameters() if p.requires_grad}

    def update(self, modules: nn.Module, step: int) -> None:
        """Move the average; the decay is lower at the start, so early weights are forgotten quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = dict(modules.named_parameters())
        for name, average in self.shadow.items():
            average.lerp_(own[name].detach().float(), 1.0 - decay)

    def copy_to(self, modules: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        own = dict(modules.named_parameters())
        with torch.no_grad():
            for name, average in self.shadow.items():
                own[name].copy_(average)


def batch_indices(step: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Indices of the samples of one step: walks seeded permutations of `range(total)` without end.

    Returns int64 `[batch_size]`; a pure function of its arguments, so any step can be reproduced alone.
    """
    place, end = step * batch_size, (step + 1) * batch_size
    taken: list[Tensor] = []
    while place < end:
        epoch, offset = divmod(place, total)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        taken.append(torch.randperm(total, generator=generator)[offset:offset + end - place])
        place += len(taken[-1])
    return torch.cat(taken)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, vectors (biases, norms) do not; frozen parameters are left out."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


Loss = Callable[[int], tuple[Tensor, Mapping[str, float]]]


def run_stage(
    name: str,
    modules: nn.Module,
    loss: Loss,
    settings: StageSettings,
    folder: str | Path,
    finish: Callable[[], Mapping[str, Any]],
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train `modules` for `settings.steps` steps, resuming from `folder/NAME.state.pt` if it is there.

    Args:
        loss: step → (scalar loss, parts to log); draws its randomness from torch's global generator, which is
            seeded from (seed, step) before every call.
        finish: called once at the end with the final (EMA) weights in place; saves them and returns metrics.
        on_step: called after each optimiser step, for work such as code-book restarts.

    Returns:
        The stage's record: metrics, steps, seconds. It is also `folder/NAME.done.json`, whose presence makes
        later calls return at once.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    done = home / f"{name}.done.json"
    if done.is_file():
        record: dict[str, Any] = json.loads(done.read_text())
        print(f"[{name}] already done ({record.get('seconds', 0):.0f} s): {done}", flush=True)
        return record
    if settings.start:
        _warm_start(Path(settings.start), modules)
    optimiser = torch.optim.AdamW(parameter_groups(modules, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
    average = Ema(modules, settings.ema) if settings.ema else None
    state_file = home / f"{name}.state.pt"
    step, spent = _restore(state_file, modules, optimiser, average)
    started = time.monotonic() - spent
    last_save = time.monotonic()
    progress = _Progress(name, settings, step)
    modules.train()
    while step < settings.steps:
        parts = _one_step(step, modules, loss, optimiser, settings)
        if average is not None:
            average.update(modules, step)
        step += 1
        if on_step is not None:
            on_step(step)
        progress.show(step, parts, home)
        if time.monotonic() - last_save > settings.save_seconds:
            _save(state_file, modules, optimiser, average, step, time.monotonic() - started)
            last_save = time.monotonic()
    _save(state_file, modules, optimiser, average, step, time.monotonic() - started)
    if average is not None:
        average.copy_to(modules)
    modules.eval()
    record = {"stage": name, "steps": step, "batch_size": settings.batch_size,
              "seconds": round(time.monotonic() - started, 1), **finish()}
    _write_json(done, record)
    print(f"[{name}] done: {json.dumps(record)}", flush=True)
    return record


def _one_step(
    step: int, modules: nn.Module, loss: Loss, optimiser: torch.optim.Optimizer, settings: StageSettings
) -> dict[str, float]:
    torch.manual_seed(settings.seed * 1_000_003 + step)
    rate = learning_rate(step, settings)
    for group in optimiser.param_groups:
        group["lr"] = rate
    device = next(modules.parameters()).device
    with _attention_kernel(device), torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16"):
        value, parts = loss(step)
    if not torch.isfinite(value):
        raise CheckpointError(f"The loss became {value.item()} at step {step}; the last saved state is intact.")
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(modules.parameters(), settings.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"loss": float(value.detach()), "grad": float(norm), "lr": rate, **parts}


def _attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On CPUs plain matrix products: the backward pass of the fused bf16 kernel is several times slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _save(file: Path, modules: nn.Module, optimiser: torch.optim.Optimizer, average: Ema | None,
          step: int, spent: float) -> None:
    state = {"model": modules.state_dict(), "optimizer": optimiser.state_dict(), "step": step, "spent": spent,
             "ema": average.shadow if average is not None else {}}
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def _restore(file: Path, modules: nn.Module, optimiser: torch.optim.Optimizer, average: Ema | None
             ) -> tuple[int, float]:
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, map_location="cpu", weights_only=True)
    modules.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimizer"])
    if average is not None:
        average.shadow = {name: value.clone() for name, value in state["ema"].items()}
    print(f"[{file.name}] resumed at step {state['step']}", flush=True)
    return int(state["step"]), float(state["spent"])


def _warm_start(file: Path, modules: nn.Module) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such state to start from.")
    state = torch.load(file, map_location="cpu", weights_only=True)
    assign_strictly(modules, {**state["model"], **state["ema"]}, file)
    print(f"[{file.name}] weights taken from {file} (step {state['step']})", flush=True)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, file)


class _Progress:
    """One line per `log_every` steps with smoothed parts, samples/s and ETA, and the same in `NAME.log.jsonl`."""

    def __init__(self, name: str, settings: StageSettings, step: int) -> None:
        self.name, self.settings = name, settings
        self.smooth: dict[str, float] = {}
        self.mark, self.mark_step = time.monotonic(), step

    def show(self, step: int, parts: Mapping[str, float], home: Path) -> None:
        """Fold in one step's numbers; print when a log line is due."""
        for key, value in parts.items():
            self.smooth[key] = value if key not in self.smooth else 0.95 * self.smooth[key] + 0.05 * value
        last = step == self.settings.steps
        if step % self.settings.log_every and not last:
            return
        seconds = max(1e-6, time.monotonic() - self.mark)
        rate = (step - self.mark_step) / seconds
        eta = (self.settings.steps - step) / max(rate, 1e-9)
        filled = int(20 * step / max(1, self.settings.steps))
        bar = "#" * filled + "." * (20 - filled)
        shown = " ".join(f"{k} {v:.4g}" for k, v in self.smooth.items() if k != "grad")
        print(f"[{self.name}] {bar} {step}/{self.settings.steps} {shown} | "
              f"{rate * self.settings.batch_size:.0f} samples/s, {eta / 60:.1f} min left", flush=True)
        with open(home / f"{self.name}.log.jsonl", "a") as log:
            line = {"step": step, "samples_per_s": rate * self.settings.batch_size, **self.smooth}
            log.write(json.dumps(line) + "\n")
        self.mark, self.mark_step = time.monotonic(), step
