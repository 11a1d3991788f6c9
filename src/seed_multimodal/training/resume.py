"""Resuming from a checkpoint: whether a run may, which settings differ from the run that saved it, restoring its
states."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.likeness import same_weights
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.checkpoint import (
    AVERAGE,
    DATA_STATE,
    OPTIMIZER,
    TRAINER_STATE,
    frozen_check_sum,
    frozen_names,
)
from seed_multimodal.training.checkpoint_folders import checkpoints, fault_of
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.state_tree import read_tree
from seed_multimodal.training.task import Task
from seed_multimodal.training.zero import ZeroEngine
from seed_multimodal.weights import assign_strictly, load_state_dict

_SHOWN = 8


def settings_remark(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str]) -> str:
    """One sentence without full stop on the differences that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent)
    shown = changes[:_SHOWN] + ([f"{len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""


def refuse_other_numbers(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str],
                         instead: str) -> None:
    """Refuse a checkpoint whose counts (`names`: key → noun) differ, on which the order of samples depends.

    Raises:
        CheckpointError: they differ.
    """
    for key, noun in names.items():
        if saved.get(key) != now[key]:
            raise CheckpointError(
                f"{folder}: was saved by a run with {saved.get(key)} {noun}, this one has {now[key]}, so it would not "
                f"continue with the same numbers; use {saved.get(key)} again, of all processes together, or take only "
                f"its weights ({instead}) in a new folder.")


def other_numbers(saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """A remark without full stop on each of the counts (`names`: key → noun) that differs from the checkpoint's."""
    return [f"the checkpoint was saved with {saved.get(key)} {noun}, this run has {now[key]}"
            for key, noun in names.items() if saved.get(key) != now[key]]


def refuse_other_kind(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str],
                      instead: str) -> None:
    """Refuse a checkpoint of another engine, model or optimiser (`names`: key → noun).

    Raises:
        ConfigError: they differ.
    """
    for key, noun in names.items():
        if saved.get(key) != now[key]:
            raise ConfigError(f"{folder}: was saved with the {noun} {_brief(saved.get(key))}, this run has "
                              f"{_brief(now[key])}; use the same, or start from its weights in a new folder "
                              f"({instead}).")


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


@dataclass
class SavedState:
    """A checkpoint's state besides its tensors. `states`: every process's own part."""

    trainer: dict[str, Any] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps made."""
        return int(self.trainer.get("global_step", 0))


def read_states(folder: Path) -> SavedState:
    """The state of a checkpoint besides its tensors.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    found = []
    for name in (TRAINER_STATE, DATA_STATE):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: is not there or not readable, so this is no checkpoint to resume "
                                  "from.") from error
    return SavedState(*found)


def refuse_other_frozen(folder: Path, saved: SavedState, now: Mapping[str, Sequence[float]], instead: str) -> None:
    """Refuse a checkpoint whose run read from other frozen models (`Task.frozen_models`): a name in the settings stays
    the same where the files behind it are exchanged.

    Raises:
        CheckpointError: one of them is another.
    """
    before = saved.trainer.get("frozen_models", {})
    other = next((name for name, value in now.items() if not same_weights(before.get(name, value), value)), None)
    if other is not None:
        raise CheckpointError(f"{folder}: was trained with another {other} than this run has; give the same one, or "
                              f"start from its weights in a new folder ({instead}).")


def load_engine(folder: Path, step: int, engine: Engine) -> None:
    """Fill an engine's optimiser (and DeepSpeed's weights); all processes call it.

    Raises:
        CheckpointError: a state of another optimiser.
    """
    if isinstance(engine, ZeroEngine):
        engine.load_shards(folder, step)
    else:
        engine.load_state_dict(read_tree(folder / OPTIMIZER), str(folder))


def load_task(folder: Path, saved: SavedState, task: Task) -> None:
    """Fill a task's module, before an engine takes it, with a checkpoint's weights; those that were left out must be
    in place already.

    Raises:
        CheckpointError: weights of another model, or other frozen weights than the checkpoint was trained beside.
    """
    if _load_weights(folder, saved, task) and saved.trainer["frozen"] != frozen_check_sum(task.module):
        raise CheckpointError(f"{folder}: the frozen weights are not those that it was trained beside; start from the "
                              "same initial weights, or in a new folder.")


def _load_weights(folder: Path, saved: SavedState, task: Task) -> bool:
    """Fill a task's module; returns whether the checkpoint leaves out the frozen weights."""
    without = saved.trainer.get("frozen") is not None
    task.load_weights(folder, [glob.escape(name) for name in frozen_names(task.module)] if without else [])
    return without


def load_average(folder: Path, average: Ema) -> None:
    """Fill a moving average; if the checkpoint has none, it starts from the current weights.

    Raises:
        CheckpointError: an average of other parameters.
    """
    if not (folder / AVERAGE).is_file():
        return
    saved = load_state_dict(folder / AVERAGE)
    if saved.keys() != average.shadow.keys():
        raise CheckpointError(f"{folder}: its averaged weights belong to other trained parameters ({len(saved)} "
                              f"tensors, this run trains {len(average.shadow)}).")
    for name, value in saved.items():
        average.shadow[name].copy_(value)


def warm_start(place: Path, task: Task) -> int:
    """Load the (averaged) weights of another run's checkpoint, without its optimiser. Returns its step.

    Args:
        place: a checkpoint, or a folder of checkpoints, whose newest complete one is taken.

    Raises:
        CheckpointError: no checkpoint there, or weights of another model.
    """
    folder = next((path for _, path in checkpoints(place) if not fault_of(path, hashes=False)), place)
    if not (folder / TRAINER_STATE).is_file():
        raise CheckpointError(f"{place}: there is no such checkpoint to start from.")
    saved = read_states(folder)
    _load_weights(folder, saved, task)
    if (folder / AVERAGE).is_file():
        assign_strictly(task.module, load_state_dict(folder / AVERAGE), folder / AVERAGE, allow_missing=["*"])
    return saved.step
