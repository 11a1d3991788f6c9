"""Checkpoints of a run: what they hold, how they are written, and how a run resumes from them.

    checkpoint-1000/
        model.safetensors                     the weights; a language model's task writes files of its own instead
        ema.safetensors                       their moving average, if one is kept
        optimizer.pt                          optimiser and loss scale (tensors and plain containers only)
        latest, global_step1000/              DeepSpeed, instead of optimizer.pt: every process's shards
        data_state.json, trainer_state.json   each process's position in the data; step, log, settings

A checkpoint is written to `.checkpoint-N.tmp`, flushed, and gets its name by one rename, so what has the name is
complete. There is no random state: the numbers of a step follow from (seed, step, process).
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from seed_multimodal.disk import disk_reason, flush, replace_folder
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.config import TrainerConfig
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.task import Task
from seed_multimodal.weights import (
    assign_strictly,
    load_state_dict,
    same_weights,
    save_state_dict,
    save_torch,
    some_weights,
)

TRAINER_STATE, DATA_STATE = "trainer_state.json", "data_state.json"
OPTIMIZER, AVERAGE = "optimizer.pt", "ema.safetensors"
FROZEN = "set of frozen weights"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a folder, the newest first."""
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / TRAINER_STATE).is_file()]
    return sorted(found, reverse=True)


class CheckpointStore:
    """The checkpoints of one run; `saved`, `place`: step and folder of the last complete one (this run's, or the one it
    resumed from)."""

    def __init__(self, home: Path, group: ProcessGroup, settings: TrainerConfig) -> None:
        self.home, self.group, self.settings = home, group, settings
        self.saved: int | None = None
        self.place: Path | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if group.first:
            _clean(home)

    def find(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The states (as `read_states`) of the checkpoint to resume from by the settings; empty: there is none. Raises
        CheckpointError: `never` but there are checkpoints, or this process does not see what the first one sees."""
        newest, resume = next((str(path) for _, path in checkpoints(self.home)), ""), self.settings.resume
        if resume == "never" and newest:
            raise CheckpointError(f"{self.home}: holds checkpoints of an earlier run (the newest is "
                                  f"{Path(newest).name}); resume from them (resume=auto) or use another folder.")
        chosen = self.group.gather({"folder": newest if resume in ("auto", "never") else resume})[0]["folder"]
        if not chosen:
            return {}, []
        self.place = Path(chosen)
        saved, states = read_states(self.place)
        self.saved = int(saved["global_step"])
        return saved, states

    def description(self) -> str:
        """The last checkpoint in words, for sentences about failures."""
        return "nothing was saved yet" if self.saved is None else f"the last checkpoint ({self.place}) is intact"

    def save(self, step: int, task: Task, engine: Any, average: Ema | None, state: Mapping[str, Any],
             own: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, `state` of the run and `own` of this process; all processes call it. Raises
        TrainingError: it, or the one before, could not be written; earlier checkpoints are intact."""
        self.finish()
        texts = {DATA_STATE: self.group.gather(own), TRAINER_STATE: dict(state)}
        if engine.sharded:
            self._write(step, lambda folder: self._fill_shards(folder, step, task, engine), texts)
            return
        if not self.group.first:
            self.saved, self.place = step, self.home / f"checkpoint-{step}"
            return
        left_out = set() if self.settings.save_frozen else set(frozen_names(task.module))
        weights = {name: value for name, value in task.weights().items() if name not in left_out}
        # Copies: a thread may write while the next steps change the weights.
        weights, shadow, optimizer = pytree.tree_map_only(
            Tensor, lambda value: value.detach().to("cpu", copy=True),
            (weights, average.shadow if average else {}, engine.state_dict()))

        def fill(folder: Path) -> None:
            task.save_files(folder, weights)
            if shadow:
                save_state_dict(shadow, folder / AVERAGE)
            save_torch(optimizer, folder / OPTIMIZER)

        self._pending = self._pool.submit(self._write, step, fill, texts)
        if not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint being written is on the disk. Raises TrainingError: it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """As `finish`, without waiting."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def _write(self, step: int, fill: Callable[[Path], None], texts: Mapping[str, Any]) -> None:
        """Fill a folder, give it its name; by all processes if the engine is sharded, else by the first."""
        folder = self.home / f".checkpoint-{step}.tmp"
        try:
            if self.group.first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            fill(folder)
            if self.group.first:
                self._publish(folder, step, texts)
        except Exception as error:
            if isinstance(error, RuntimeError) and "write" not in str(error) and "inline_container" not in str(error):
                raise
            reason = disk_reason(error) if isinstance(error, OSError) else first_line(error)
            free = shutil.disk_usage(self.home).free / 2**20  # torch.save does not say that the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(f"The checkpoint of step {step} cannot be written: {reason} ({free:,.0f} MiB of the "
                                f"disk are free); {self.description()}.") from error
        self.saved, self.place = step, self.home / f"checkpoint-{step}"

    def _fill_shards(self, folder: Path, step: int, task: Task, engine: Any) -> None:
        self.group.agree(False)  # the folder is there
        engine.save_shards(folder, step)
        weights = engine.weights()
        if self.group.first:
            task.save_files(folder, task.weights(weights))
        self.group.agree(False)  # everything is written

    def _publish(self, folder: Path, step: int, texts: Mapping[str, Any]) -> None:
        """Flush a complete folder, give it its name, and remove the oldest."""
        for name, content in texts.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        for path in filter(Path.is_file, folder.rglob("*")):
            flush(path)
        replace_folder(folder, self.home / f"checkpoint-{step}")
        flush(self.home)
        # Later ones are of a run that resumed from an earlier step; counting them would remove the one just written.
        present = [path for number, path in checkpoints(self.home) if number <= step]
        for path in present[self.settings.save_total_limit or len(present):]:
            aside = path.with_name(f".{path.name}.old")
            os.replace(path, aside)  # so that nothing half removed looks like a checkpoint
            shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what a killed run left half written, and put back a checkpoint that was just being replaced."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = re.fullmatch(r"\.(checkpoint-\d+)\.(tmp|(\d+\.)?old)", path.name)
        if name and name[3] and not (folder / name[1]).exists():
            os.replace(path, folder / name[1])
        elif name:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- resuming


def read_states(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of a checkpoint the state of the trainer and those of the processes. Raises CheckpointError: it holds none."""
    found = []
    for name in (TRAINER_STATE, DATA_STATE):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: is not there or not readable, so this is no checkpoint to resume "
                                  "from.") from error
    return found[0], found[1]


def settings_remark(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, silent: Sequence[str]) -> str:
    """One sentence without full stop on the differences that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent) if before and now else []
    shown = changes[:8] + ([f"{len(changes) - 8} more"] if len(changes) > 8 else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""


def load_task(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    """Fill a task's module, before an engine takes it, with a checkpoint's weights; those left out must be in place.
    Raises CheckpointError: weights of another model, or other frozen weights or models than it was trained with."""
    _load_weights(folder, saved, task)
    now = frozen_state(task, save_frozen=False)
    for name, before in saved["frozen"].items():
        if name in now and not same_weights(before, now[name]):
            raise CheckpointError(f"{folder}: was trained with another {name} than this run has; give the same one, or "
                                  f"start from its weights in a new folder ({task.start_hint}).")


def frozen_state(task: Task, save_frozen: bool) -> dict[str, Any]:
    """By name some weights of what a run uses and its checkpoints do not hold."""
    return {**task.frozen_models(), **({} if save_frozen else {FROZEN: some_weights(task.module, frozen=True)})}


def _load_weights(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    task.load_weights(folder, [glob.escape(name) for name in frozen_names(task.module)] if FROZEN in saved["frozen"]
                      else [])


def load_average(folder: Path, average: Ema) -> None:
    """Fill a moving average; if the checkpoint has none, it starts from the current weights. Raises CheckpointError."""
    if not (folder / AVERAGE).is_file():
        return
    saved = load_state_dict(folder / AVERAGE)
    if saved.keys() != average.shadow.keys():
        raise CheckpointError(f"{folder}: its averaged weights belong to other trained parameters ({len(saved)} "
                              f"tensors, this run trains {len(average.shadow)}).")
    for name, value in saved.items():
        average.shadow[name].copy_(value)


def warm_start(place: Path, task: Task) -> int:
    """Load the (averaged) weights of another run's checkpoint, or of the newest in a folder; returns its step. Raises
    CheckpointError: no checkpoint there, or weights of another model."""
    folder = next((path for _, path in checkpoints(place)), place)
    if not (folder / TRAINER_STATE).is_file():
        raise CheckpointError(f"{place}: there is no such checkpoint to start from.")
    saved, _ = read_states(folder)
    _load_weights(folder, saved, task)
    if (folder / AVERAGE).is_file():
        assign_strictly(task.module, load_state_dict(folder / AVERAGE), folder / AVERAGE, allow_missing=["*"])
    return int(saved["global_step"])


def frozen_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
