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
import threading
from collections.abc import Callable, Mapping, Sequence
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


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a folder, the newest first."""
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / TRAINER_STATE).is_file()]
    return sorted(found, reverse=True)


class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        saved, place: step and folder of the last complete one (this run's, or the one it resumed from).
        problem: why the last one could not be written, if so.
    """

    def __init__(self, home: Path, group: ProcessGroup, settings: TrainerConfig) -> None:
        self.home, self.group, self.settings = home, group, settings
        self.saved: int | None = None
        self.place: Path | None = None
        self.problem: TrainingError | None = None
        self._thread: threading.Thread | None = None
        if group.first:
            _clean(home)

    def find(self) -> Path | None:
        """The checkpoint to resume from by the settings; None: there is none.

        Raises:
            CheckpointError: `never` but there are checkpoints, or the processes see different ones.
        """
        present, resume = checkpoints(self.home), self.settings.resume
        if resume not in ("auto", "never"):
            self.saved, self.place = int(read_states(Path(resume))[0]["global_step"]), Path(resume)
            return self.place
        if resume == "never" and present:
            raise CheckpointError(f"{self.home}: holds checkpoints of an earlier run (the newest is "
                                  f"{present[0][1].name}); resume from them (resume=auto) or use another folder.")
        listed = [answer["steps"] for answer in self.group.gather({"steps": [step for step, _ in present]})]
        if any(steps != listed[0] for steps in listed):
            raise CheckpointError(f"{self.home}: the processes see different checkpoints in it; the output folder must "
                                  "be on a disk that all of them share.")
        if present:
            self.saved, self.place = present[0]
        return self.place

    def description(self) -> str:
        """The last checkpoint in words, for sentences about failures."""
        return "nothing was saved yet" if self.saved is None else f"the last checkpoint ({self.place}) is intact"

    def save(self, step: int, task: Task, engine: Any, average: Ema | None, state: Mapping[str, Any],
             own: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, `state` of the run and `own` of this process; all processes call it.

        Raises:
            TrainingError: it could not be written; the checkpoints before it are intact.
        """
        self.finish()
        texts = {DATA_STATE: self.group.gather(own), TRAINER_STATE: dict(state)}
        if engine.sharded:
            self._save_shards(step, task, engine, texts)
            return
        if self.group.first:
            left_out = set() if self.settings.save_frozen else set(frozen_names(task.module))
            # Copies: a thread may write while the next steps change the weights.
            weights = {name: value.detach().to("cpu", copy=True) for name, value in task.weights().items()
                       if name not in left_out}
            shadow = {name: value.to("cpu", copy=True) for name, value in average.shadow.items()} if average else {}
            optimizer = pytree.tree_map_only(
                Tensor, lambda value: value.detach().to("cpu", copy=True), engine.state_dict())

            def fill(folder: Path) -> None:
                task.save_files(folder, weights)
                if shadow:
                    save_state_dict(shadow, folder / AVERAGE)
                save_torch(optimizer, folder / OPTIMIZER)

            self._thread = threading.Thread(target=self._write, args=(step, fill, texts), name="checkpoint")
            self._thread.start()
        else:
            self._is_saved(step)
        if not self.settings.async_save:
            self.finish()

    def join(self) -> None:
        """Wait until the checkpoint being written is on the disk (or has failed: `problem`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises TrainingError: a checkpoint could not be written. The other processes end with this one."""
        if self.problem is not None:
            raise self.problem

    def finish(self) -> None:
        """As `join`, then `check`."""
        self.join()
        self.check()

    def _write(self, step: int, fill: Callable[[Path], None], texts: Mapping[str, Any]) -> None:
        """Fill and publish a folder (first process alone)."""
        try:
            folder = self._temporary(step)
            fill(folder)
            self._publish(folder, step, texts)
            self._is_saved(step)
        except Exception as error:  # noqa: BLE001 (an exception in a thread would be lost)
            self.problem = self._unwritable(step, error)
            _clean(self.home)

    def _save_shards(self, step: int, task: Task, engine: Any, texts: Mapping[str, Any]) -> None:
        folder = self.home / f".checkpoint-{step}.tmp"
        try:
            if self.group.first:
                self._temporary(step)
            self.group.agree(False)  # the folder is there
            engine.save_shards(folder, step)
            weights = engine.weights()
            if self.group.first:
                task.save_files(folder, task.weights(weights))
            self.group.agree(False)  # everything is written
            if self.group.first:
                self._publish(folder, step, texts)
            self.group.agree(False)  # it has its name
        except (OSError, RuntimeError) as error:  # torch.save reports only that its file writer failed
            if isinstance(error, RuntimeError) and "write" not in str(error) and "inline_container" not in str(error):
                raise
            raise self._unwritable(step, error) from error
        self._is_saved(step)

    def _temporary(self, step: int) -> Path:
        place = self.home / f".checkpoint-{step}.tmp"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

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

    def _unwritable(self, step: int, error: Exception) -> TrainingError:
        reason = disk_reason(error) if isinstance(error, OSError) else first_line(error)
        free = shutil.disk_usage(self.home).free / 2**20  # torch.save does not say that the disk is full
        return TrainingError(f"The checkpoint of step {step} cannot be written: {reason} ({free:,.0f} MiB of the disk "
                             f"are free); {self.description()}.")

    def _is_saved(self, step: int) -> None:
        self.saved, self.place = step, self.home / f"checkpoint-{step}"


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


def settings_remark(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str]) -> str:
    """One sentence without full stop on the differences that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent)
    shown = changes[:8] + ([f"{len(changes) - 8} more"] if len(changes) > 8 else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""


def load_task(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    """Fill a task's module, before an engine takes it, with a checkpoint's weights; those that were left out must be
    in place already.

    Raises:
        CheckpointError: weights of another model, or other frozen weights or models than it was trained with.
    """
    before = saved.get("frozen_models", {})
    other = next((name for name, now in task.frozen_models().items()
                  if not same_weights(before.get(name, now), now)), None)
    if other is not None:
        raise CheckpointError(f"{folder}: was trained with another {other} than this run has; give the same one, or "
                              f"start from its weights in a new folder ({task.start_hint}).")
    _load_weights(folder, saved, task)
    if saved.get("frozen") is not None and not same_weights(saved["frozen"], some_weights(task.module, frozen=True)):
        raise CheckpointError(f"{folder}: the frozen weights are not those that it was trained with; start from the "
                              "same initial weights, or in a new folder.")


def _load_weights(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    without = saved.get("frozen") is not None
    task.load_weights(folder, [glob.escape(name) for name in frozen_names(task.module)] if without else [])


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
    """Load the (averaged) weights of another run's checkpoint, or of the newest in a folder; returns its step.

    Raises:
        CheckpointError: no checkpoint there, or weights of another model.
    """
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
