"""The restartable training loop that every stage runs through, from nano on one core to many processes.

A stage is modules, a loss of (micro-step) and an evaluation. Sample order and augmentation are functions of (seed,
step), so a run killed at any step and started again continues with the same numbers; the state on disk (state.py) is
replaced atomically. Peculiar: with bf16, the default, losses are computed under autocast with fp32 master weights on
every device, which on recent CPUs is about twice as fast as fp32.

With `torchrun`, all processes call `run_stage` with a model wrapped in DistributedDataParallel and a folder that all
of them see; the first writes, the others wait. A stage goes on only with as many processes and samples per step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.loop_settings import PRECISIONS, SampleCost, StageSettings
from seed_multimodal.training.old.distributed import ProcessGroup, StopRequest
from seed_multimodal.training.old.run_log import Progress, Status
from seed_multimodal.training.old.state import Own, StateFile, read_record, warm_start, write_json
from seed_multimodal.training.old.step import Loss, Stepper
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.schedules import batch_indices, learning_rate

__all__ = ["Ema", "Loss", "SampleCost", "StageSettings", "batch_indices", "learning_rate", "parameter_groups",
           "run_stage"]

OnStep = Callable[[int], Mapping[str, float] | None]


def run_stage(
    name: str,
    modules: nn.Module,
    loss: Loss,
    settings: StageSettings,
    folder: str | Path,
    finish: Callable[[], Mapping[str, Any]],
    on_step: OnStep | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    wrapped: nn.Module | None = None,
    status: Status | None = None,
    cost: SampleCost | None = None,
    own: Own | None = None,
) -> dict[str, Any]:
    """Train `modules` for `settings.steps` steps, resuming from `folder/NAME.state.pt` if it is there.

    Args:
        loss: micro-step (`step · accumulate + m`; the step itself without accumulation) → (scalar mean loss, parts
            to log: floats or scalar tensors); draws its randomness from torch's global generator, which is seeded
            from (seed, micro-step, rank) before every call. Calls `wrapped`, not `modules`, if there is one.
        finish: called once at the end, in the first process only (so no collective calls), with the final (EMA)
            weights in place; saves them and returns metrics that JSON can hold.
        on_step: called after each optimiser step with the number of steps made, in every process, for work such as
            code-book restarts, which must leave all processes' weights equal. Numbers that it returns (of an
            evaluation: the same keys in every process) are logged at once, as they are, in a line of this step.
        optimizer: trains (some of) the parameters of `modules`; AdamW on all that need gradients by default.
        schedule: step → learning rate; times a group's `lr_scale` if it has one. `learning_rate` by default.
        wrapped: the DistributedDataParallel object around (a part of) `modules`; needed with several processes.
        status: asked at each log step for more numbers: counts (int, summed over processes), measures (float,
            averaged), `wait_seconds` (all time spent waiting for data), which is logged as the share `wait_share`, and
            `aside_seconds` (all time spent on other things than steps), which is left out of the speed.
        cost: of a sample, for the log's `tflops` and `mfu`.
        own: what each process keeps for itself; saved and restored with the state.

    Returns:
        The stage's record: metrics, steps, seconds. It is also `folder/NAME.done.json`, whose presence makes
        later calls return at once (but see `settings.further`).

    Raises:
        ConfigError: settings no run can follow, several processes without `wrapped`, an optimiser of other weights.
        CheckpointError: a loss or gradient that is not finite, a state of another run, a disk that cannot be written;
            the state on disk stays as it was.
        SystemExit: 143 after SIGTERM: the step was finished and the state saved. With several processes, data workers
            must ignore the signal for that (torchrun sends it to them, too).
    """
    check_settings(name, settings)
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    with ProcessGroup(name, wrapped) as peers:
        record = _done_before(name, home, peers, settings)
        if record is not None:
            return record
        optimiser = optimizer or torch.optim.AdamW(
            parameter_groups(modules, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
        stepper = Stepper(name, modules, loss, optimiser, settings,
                          schedule or (lambda step: learning_rate(step, settings)), wrapped, peers.rank)
        file = home / f"{name}.state.pt"
        if settings.start and not file.is_file():
            _start_warm(name, settings, modules, peers)
        average = Ema(modules, settings.ema) if settings.ema else None
        store = StateFile(file, modules, optimiser, average, stepper.scaler, peers,
                          settings.batch_size * settings.accumulate * peers.world, settings.save_frozen, own=own)
        step, spent = store.restore()
        started = time.monotonic() - spent
        progress = Progress(name, settings, step, home, peers, stepper.device, store.smooth, status, cost)
        modules.train()
        try:
            step = _steps(step, stepper, store, progress, started, on_step)
        finally:
            progress.close()
        if progress.problem is not None:
            raise progress.problem
        if average is not None:
            average.copy_to(modules)
        modules.eval()
        return _finish(name, step, settings, home, store, started, finish)


def _steps(step: int, stepper: Stepper, store: StateFile, progress: Progress, started: float,
           on_step: OnStep | None) -> int:
    """Make all steps from `step` on; saves the state when it is due, at the end, and when the run is stopped."""
    settings, peers, modules, average = stepper.settings, store.peers, store.modules, store.average
    last_save = time.monotonic()
    stopped = False
    with StopRequest() as stop:
        while step < settings.steps and not stopped:
            try:
                numbers, problem = stepper.gradients(step)
            except RuntimeError as error:
                # A signal to the whole process group ends data workers, too; the weights are still of the step before.
                if not stop.asked or peers.world > 1:
                    raise
                print(f"[{progress.name}] step {step} was given up: {first_line(error)}", flush=True)
                break
            due = peers.first and time.monotonic() - last_save > settings.save_seconds
            failed, stopped, save = peers.agree(bool(problem or progress.problem), stop.asked, due)
            if failed:
                raise progress.problem or CheckpointError(
                    f"{problem or 'Another process failed'} at step {step}; {store.left()}.")
            stepper.update()
            if average is not None:
                average.update(modules, step)
            step += 1
            progress.show(step, numbers, on_step(step) if on_step is not None else None)
            if save or (settings.save_every_steps and step % settings.save_every_steps == 0):
                store.save(step, time.monotonic() - started)
                last_save = time.monotonic()
        if store.saved_step != step:
            store.save(step, time.monotonic() - started)
        if peers.agree(stopped or stop.asked)[0]:
            if peers.first:
                print(f"[{progress.name}] stopped by SIGTERM after step {step} of {settings.steps}; the state is in "
                      f"{store.file}, and the same command goes on from there.", flush=True)
            raise SystemExit(143)
    return step


def _start_warm(name: str, settings: StageSettings, modules: nn.Module, peers: ProcessGroup) -> None:
    earlier = warm_start(Path(settings.start), modules)
    if peers.first:
        print(f"[{name}] weights taken from {settings.start} (step {earlier})", flush=True)


def _done_before(name: str, home: Path, peers: ProcessGroup, settings: StageSettings) -> dict[str, Any] | None:
    done = home / f"{name}.done.json"
    here = done.is_file()
    someone, someone_not = peers.agree(here, not here)
    if someone and someone_not:
        raise CheckpointError(f"{done}: only some processes see it; the folder must be on a disk that all share.")
    if not here:
        return None
    record = read_record(done)
    if settings.further and int(record.get("steps", 0)) < settings.steps and (home / f"{name}.state.pt").is_file():
        return None
    if peers.first:
        print(f"[{name}] already done ({record.get('seconds', 0):.0f} s): {done}", flush=True)
    return record


def _finish(name: str, step: int, settings: StageSettings, home: Path, store: StateFile, started: float,
            finish: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0 evaluates and writes the record; every process returns it."""
    record: dict[str, Any] = {}
    if store.peers.first:
        shared = {"accumulate": settings.accumulate, "processes": store.peers.world}
        record = {"stage": name, "steps": step, "batch_size": settings.batch_size,
                  **{key: count for key, count in shared.items() if count > 1},
                  **({"begun": store.begun} if store.begun else {}),
                  "seconds": round(time.monotonic() - started, 1), **finish()}
        write_json(home / f"{name}.done.json", record)
        print(f"[{name}] done: {json.dumps(record)}", flush=True)
    return store.peers.gather(record)[0]


def check_settings(name: str, settings: StageSettings) -> None:
    """Refuse settings that no run can follow.

    Raises:
        ConfigError: an unknown precision, or a count below its smallest value.
    """
    if settings.precision not in PRECISIONS:
        raise ConfigError(f"[{name}] precision must be one of {', '.join(PRECISIONS)}, not {settings.precision!r}.")
    for key, least in (("steps", 0), ("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("save_every_steps", 0)):
        if getattr(settings, key) < least:
            raise ConfigError(f"[{name}] {key} must be at least {least}, not {getattr(settings, key)}.")
    if not settings.clip >= 0.0:  # also NaN; a negative one would turn the gradients round
        raise ConfigError(f"[{name}] clip must be at least 0 (no clipping), not {settings.clip}.")
    if not 0.0 <= settings.ema < 1.0:
        raise ConfigError(f"[{name}] ema must be at least 0 (no average) and below 1, not {settings.ema}.")
