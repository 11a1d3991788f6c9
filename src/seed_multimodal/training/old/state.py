"""The state a run goes on from: one file, replaced atomically, that also says which kind of run may read it.

`NAME.state.pt` holds model, optimizer, ema, scaler, step, spent (seconds), world (processes), batch (samples per
optimiser step, over all processes), smooth (numbers as logged), frozen (a check sum of weights that were left out),
begun (the step at which `spent` was 0) and own (what each process keeps of its own, in the order of ranks).
States written before scaler, world, batch, smooth, frozen, begun and own were kept are read as those of one process.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import nn

from seed_multimodal.disk import flush_folder, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.old.distributed import ProcessGroup
from seed_multimodal.weights import assign_strictly, read_torch


class Own(Protocol):
    """What a process keeps for itself, such as the samples it found unreadable; `state_dict` is for JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class StateFile:
    """Everything that a state is made of, and the file it goes to. `begun`: steps that an earlier run, of which this
    one knows no time, has made; `own`: see `Own`."""

    file: Path
    modules: nn.Module
    optimiser: torch.optim.Optimizer
    average: Ema | None
    scaler: torch.amp.GradScaler
    peers: ProcessGroup
    batch: int
    keep_frozen: bool = True
    saved_step: int | None = None
    begun: int = 0
    own: Own | None = None
    smooth: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frozen = [n for n, p in self.modules.named_parameters(remove_duplicate=False) if not p.requires_grad]
        self._check_sum: int | None = None

    def restore(self) -> tuple[int, float]:
        """Load the file if it is there; returns the next step and the seconds spent so far (0, 0.0 without one).

        Raises:
            CheckpointError: a damaged file, one of another model, optimiser, number of processes or batch, or other
                frozen weights; or processes that do not see the same file.
        """
        step, spent = self._load() if self.file.is_file() else (0, 0.0)
        steps = [int(answer["step"]) for answer in self.peers.gather({"step": step})]
        if len(set(steps)) > 1:
            raise CheckpointError(f"{self.file}: the processes found states of different steps ({steps}); the folder "
                                  "must be on a disk that all of them share.")
        return step, spent

    def save(self, step: int, spent: float) -> None:
        """Replace the file (rank 0 writes, all wait).

        Raises:
            CheckpointError: the file cannot be written, for example because the disk is full; the one before stays.
        """
        problem = None
        shares = self.peers.gather(self.own.state_dict()) if self.own is not None else []
        if self.peers.first:
            try:
                _write_torch(self.file, {**self._state(step, spent), "own": shares})
            except CheckpointError as error:
                problem = error
        if self.peers.agree(problem is not None)[0]:
            raise problem or CheckpointError(f"{self.file}: the first process could not write the state (step {step}).")
        self.saved_step = step

    def left(self) -> str:
        """What a sentence about a failure says of the state on disk."""
        return "nothing was saved yet" if self.saved_step is None else (
            f"the last saved state (step {self.saved_step}) is intact")

    def _state(self, step: int, spent: float) -> dict[str, Any]:
        model = self.modules.state_dict()
        if not self.keep_frozen:
            left_out = set(self.frozen)
            model = {name: value for name, value in model.items() if name not in left_out}
        return {"model": model, "optimizer": self.optimiser.state_dict(), "step": step, "spent": spent,
                "ema": self.average.shadow if self.average is not None else {}, "scaler": self.scaler.state_dict(),
                "world": self.peers.world, "batch": self.batch, "smooth": dict(self.smooth), "begun": self.begun,
                "frozen": None if self.keep_frozen else self._frozen_check_sum()}

    def _load(self) -> tuple[int, float]:
        state = _read(self.file)
        self._refuse_another_run(state)
        without = state.get("frozen") is not None
        allowed = [glob.escape(name) for name in self.frozen] if without else []
        assign_strictly(self.modules, state["model"], self.file, allow_missing=allowed)
        if without and state["frozen"] != self._frozen_check_sum():
            raise CheckpointError(f"{self.file}: the frozen weights are not those that this state was trained beside; "
                                  "start from the same initial weights, or in a new folder.")
        try:
            self.optimiser.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.file}: holds the state of another optimiser ({error}).") from error
        if self.average is not None:
            self._load_average(state["ema"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.saved_step = int(state["step"])
        self.begun = int(state.get("begun", 0))
        self.smooth.update(state.get("smooth", {}))
        if self.own is not None and state.get("own"):
            self.own.load_state_dict(state["own"][self.peers.rank])
        if self.peers.first:
            print(f"[{self.file.name}] resumed at step {state['step']}", flush=True)
        return int(state["step"]), float(state["spent"])

    def _refuse_another_run(self, state: Mapping[str, Any]) -> None:
        own = ((self.peers.world, state.get("world", 1), "processes"),
               (self.batch, state.get("batch", self.batch), "samples per step"))
        for now, then, what in own:
            if now != then:
                raise CheckpointError(
                    f"{self.file}: was saved by a run with {then} {what}, this one has {now}, so it would not go on "
                    f"with the same numbers; use {then} again, or take only its weights (`start`) in a new folder.")

    def _load_average(self, saved: Mapping[str, torch.Tensor]) -> None:
        assert self.average is not None
        if not saved:
            self.average = Ema(self.modules, self.average.decay)
            return
        if saved.keys() != self.average.shadow.keys():
            raise CheckpointError(f"{self.file}: its averaged weights belong to other trained parameters "
                                  f"({len(saved)} tensors, this run trains {len(self.average.shadow)}).")
        for name, value in saved.items():
            self.average.shadow[name].copy_(value)

    def _frozen_check_sum(self) -> int:
        """CRC of eight values of every frozen parameter; they do not change, so it is worked out once."""
        if self._check_sum is None:
            own = dict(self.modules.named_parameters(remove_duplicate=False))
            total = 0
            for name in self.frozen:
                flat = own[name].detach().flatten()
                places = torch.tensor([i * (len(flat) - 1) // 7 for i in range(8)] if len(flat) else [])
                picked = flat[places.long().to(flat.device)].float().tolist()
                total = zlib.crc32(f"{name}{tuple(own[name].shape)}{picked}".encode(), total)
            self._check_sum = total
        return self._check_sum


def warm_start(file: Path, modules: nn.Module) -> int:
    """Take the (averaged) weights of another run's state; its optimiser is left behind. Returns its step.

    Raises:
        CheckpointError: no such file, or weights of another model.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such state to start from.")
    state = _read(file)
    allowed = [glob.escape(n) for n, p in modules.named_parameters(remove_duplicate=False) if not p.requires_grad]
    assign_strictly(modules, {**state["model"], **state["ema"]}, file,
                    allow_missing=allowed if state.get("frozen") is not None else [])
    return int(state["step"])


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        replace_text(file, json.dumps(value, indent=1))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror}).") from error


def read_record(file: Path) -> dict[str, Any]:
    """The record of a stage that is done.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        record = read_json_object(file)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove it, and the stage goes on from its state.") from error
    return record


def _read(file: Path) -> dict[str, Any]:
    state = dict(read_torch(file))
    missing = [key for key in ("model", "optimizer", "step", "spent", "ema") if key not in state]
    if missing:
        raise CheckpointError(f"{file}: is no state of a training run (it has no {missing[0]!r}).")
    return state


class _Listening:
    """A file for `torch.save` that remembers why a write failed; torch reports only that something did."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.handle.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.handle.flush()


def replace_torch(file: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` into a file, flushed, whole or not at all; raises OSError and leaves what was there."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as handle:
            listening = _Listening(handle)
            try:
                torch.save(content, listening)
            except RuntimeError:
                if listening.failure is None:
                    raise
                raise listening.failure from None
            _to_disk(handle)
        os.replace(temporary, file)
        flush_folder(file.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _write_torch(file: Path, state: Mapping[str, Any]) -> None:
    try:
        replace_torch(file, state)
    except OSError as error:
        before = "the state saved before is intact" if file.is_file() else "nothing was saved before"
        raise CheckpointError(f"{file}: the state of step {state['step']} cannot be written ({error.strerror}); "
                              f"{before}.") from error


def _to_disk(handle: IO[Any]) -> None:
    handle.flush()
    os.fsync(handle.fileno())
