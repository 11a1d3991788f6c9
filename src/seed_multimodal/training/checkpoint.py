"""Checkpoints of a run: layout, atomic writing, resuming.

    checkpoint-1000/
        model.safetensors                     weights; a language model's task writes other files instead
        ema.safetensors                       their moving average, if enabled
        optimizer.pt                          optimizer and loss scale (tensors and plain containers only)
        latest, global_step1000/              DeepSpeed instead of optimizer.pt: shards of all processes
        data_state.json, trainer_state.json   data position of each process; step, log, settings

A checkpoint is written to `.checkpoint-N.tmp`, flushed and renamed, so a folder with the final name is complete. No
random state is saved: random numbers of a step are determined by (seed, step, process).
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

from seed_multimodal.disk import disk_reason, flush, read_json_object, replace_folder, writing
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.config import TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.optimizers import Ema
from seed_multimodal.training.task import Task
from seed_multimodal.weights import (
    assign_strictly,
    fingerprint,
    load_state_dict,
    same_fingerprint,
    save_state_dict,
    save_torch,
)

TRAINER_STATE, DATA_STATE = "trainer_state.json", "data_state.json"
OPTIMIZER, AVERAGE = "optimizer.pt", "ema.safetensors"
FROZEN = "set of frozen weights"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a folder, newest first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and (path / TRAINER_STATE).is_file()
    ]
    return sorted(found, reverse=True)


class CheckpointStore:
    """The checkpoints of one run; `saved`, `place`: step and folder of the last one written or resumed from."""

    def __init__(self, home: Path, group: ProcessGroup, settings: TrainerSettings) -> None:
        self.home, self.group, self.settings = home, group, settings
        self.saved: int | None = None
        self.place: Path | None = None
        self.branch = (
            ""  # the checkpoint named by `resume` from which this branch of the run started
        )
        self.starts_branch = False
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if group.first:
            _clean(home)

    def find(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The states (as `read_states`) of the checkpoint to resume from, or empty: the newest one of this branch.

        Raises CheckpointError: `never` but checkpoints exist, or processes see different files.
        """
        resume = self.settings.resume
        newest = next((path for _, path in checkpoints(self.home)), None)
        if resume == "never" and newest is not None:
            raise CheckpointError(
                f"{self.home}: contains checkpoints of an earlier run (the newest is "
                f"{newest.name}); resume from them (resume=auto) or use another folder."
            )
        choice: dict[str, Any] = {"folder": str(newest or ""), "branch": "", "is_new": False}
        if resume not in ("auto", "never"):
            choice["branch"] = self._branch_name(Path(resume))
            # The same command again continues the branch that it has started.
            if newest is None or read_states(newest)[0].get("branch") != choice["branch"]:
                choice |= {"folder": resume, "is_new": True}
        choice = self.group.gather(choice)[0]
        if not choice["folder"]:
            return {}, []
        self.place = Path(choice["folder"])
        saved, states = read_states(self.place)
        self.saved = int(saved["global_step"])
        self.branch = choice["branch"] or saved.get("branch", "")
        self.starts_branch = choice["is_new"]
        return saved, states

    def _branch_name(self, start: Path) -> str:
        """The checkpoint that a branch starts from: its name if it is one of this run, else its path."""
        start = start.resolve()
        return start.name if start.parent == self.home.resolve() else str(start)

    def set_aside(self) -> str:
        """At the start of a branch, move the checkpoints that are not before it to a folder `abandoned-N`.

        Returns a sentence about them, or "". Raises CheckpointError: disk error.
        """
        if not (self.starts_branch and self.group.first and self.saved is not None):
            return ""
        is_own = self.branch == self._branch_name(self.home / f"checkpoint-{self.saved}")
        last_kept = self.saved if is_own else -1
        abandoned = [path for step, path in checkpoints(self.home) if step > last_kept]
        if not abandoned:
            return ""
        number = 1
        while (self.home / f"abandoned-{number}").exists():
            number += 1
        folder = self.home / f"abandoned-{number}"
        with writing(folder):
            folder.mkdir()
            for path in abandoned:
                os.replace(path, folder / path.name)
        names = ", ".join(path.name for path in reversed(abandoned))
        return f"starts a branch; {names} were moved to {folder}."

    def description(self) -> str:
        """The last checkpoint, for error messages."""
        return (
            "nothing was saved yet"
            if self.saved is None
            else f"the last checkpoint ({self.place}) is intact"
        )

    def save(
        self,
        step: int,
        task: Task,
        engine: Any,
        average: Ema | None,
        state: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint, with `state` of the run and `own` of this process; collective. Raises TrainingError: this
        or the previous one could not be written."""
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
        # Copies, since a thread may write while the next steps update the weights.
        weights, shadow, optimizer = pytree.tree_map_only(
            Tensor,
            lambda value: value.detach().to("cpu", copy=True),
            (weights, average.shadow if average else {}, engine.state_dict()),
        )

        def fill(folder: Path) -> None:
            task.save_files(folder, weights)
            if shadow:
                save_state_dict(shadow, folder / AVERAGE)
            save_torch(optimizer, folder / OPTIMIZER)

        self._pending = self._pool.submit(self._write, step, fill, texts)
        if not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written. Raises TrainingError: writing failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise as `finish`, without waiting."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def _write(self, step: int, fill: Callable[[Path], None], texts: Mapping[str, Any]) -> None:
        """Fill a folder and rename it; in all processes if the engine is sharded, else in the first."""
        folder = self.home / f".checkpoint-{step}.tmp"
        try:
            if self.group.first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            fill(folder)
            if self.group.first:
                self._publish(folder, step, texts)
        except Exception as error:
            if (
                isinstance(error, RuntimeError)
                and "write" not in str(error)
                and "inline_container" not in str(error)
            ):
                raise
            reason = disk_reason(error) if isinstance(error, OSError) else first_line(error)
            free = (
                shutil.disk_usage(self.home).free / 2**20
            )  # torch.save does not report a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {step} cannot be written: {reason} ({free:,.0f} MiB of the "
                f"disk are free); {self.description()}."
            ) from error
        self.saved, self.place = step, self.home / f"checkpoint-{step}"

    def _fill_shards(self, folder: Path, step: int, task: Task, engine: Any) -> None:
        self.group.agree(False)  # the folder exists
        engine.save_shards(folder, step)
        weights = engine.weights()
        if self.group.first:
            task.save_files(folder, task.weights(weights))
        self.group.agree(False)  # all shards are written

    def _publish(self, folder: Path, step: int, texts: Mapping[str, Any]) -> None:
        """Flush a complete folder, rename it, and remove the oldest."""
        for name, content in texts.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        for path in filter(Path.is_file, folder.rglob("*")):
            flush(path)
        replace_folder(folder, self.home / f"checkpoint-{step}")
        flush(self.home)
        earlier = [path for number, path in checkpoints(self.home) if number < step]
        scheduled = [
            path for path in earlier if not read_json_object(path / TRAINER_STATE).get("interim")
        ]
        limit = self.settings.save_total_limit
        kept = scheduled if limit is None else scheduled[: limit - 1]  # the one just written counts
        for path in (path for path in earlier if path not in kept):
            aside = path.with_name(f".{path.name}.old")
            os.replace(path, aside)  # so that a partly removed folder is not a checkpoint
            shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run, and restore one that was being replaced."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = re.fullmatch(r"\.(checkpoint-\d+)\.(tmp|(\d+\.)?old)", path.name)
        if name and name[3] and not (folder / name[1]).exists():
            os.replace(path, folder / name[1])
        elif name:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- resuming


def read_states(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """States of the trainer and of the processes in a checkpoint. Raises CheckpointError: missing."""
    found = []
    for name in (TRAINER_STATE, DATA_STATE):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / name}: missing or not readable, so this is no checkpoint to resume "
                "from."
            ) from error
    return found[0], found[1]


def settings_remark(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, silent: Sequence[str]
) -> str:
    """A message without full stop about the differences that `changed_settings` finds, or ""."""
    changes = changed_settings(before, now, silent) if before and now else []
    shown = changes[:8] + ([f"{len(changes) - 8} more"] if len(changes) > 8 else [])
    return f"settings changed since the checkpoint: {'; '.join(shown)}" if changes else ""


def load_task(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    """Load a checkpoint's weights into a task's module before the engine wraps it; frozen weights must be set. Raises
    CheckpointError: another model, or other frozen weights or models."""
    _load_weights(folder, saved, task)
    now = frozen_state(task, save_frozen=False)
    for name, before in saved["frozen"].items():
        if name in now and not same_fingerprint(before, now[name]):
            raise CheckpointError(
                f"{folder}: was trained with another {name}; use the same one, or "
                f"start from its weights in a new folder ({task.start_hint})."
            )


def frozen_state(task: Task, save_frozen: bool) -> dict[str, Any]:
    """Name -> sample of the frozen weights that checkpoints do not contain."""
    return {
        **task.frozen_models(),
        **({} if save_frozen else {FROZEN: fingerprint(task.module, frozen=True)}),
    }


def _load_weights(folder: Path, saved: Mapping[str, Any], task: Task) -> None:
    task.load_weights(
        folder,
        [glob.escape(name) for name in frozen_names(task.module)]
        if FROZEN in saved["frozen"]
        else [],
    )


def load_average(folder: Path, average: Ema) -> None:
    """Load a moving average, by default starting from the current weights. Raises CheckpointError."""
    if not (folder / AVERAGE).is_file():
        return
    saved = load_state_dict(folder / AVERAGE)
    if saved.keys() != average.shadow.keys():
        raise CheckpointError(
            f"{folder}: its averaged weights are of other trained parameters ({len(saved)} "
            f"tensors, this run trains {len(average.shadow)})."
        )
    for name, value in saved.items():
        average.shadow[name].copy_(value)


def warm_start(place: Path, task: Task) -> int:
    """Load the (averaged) weights of a checkpoint, or of the newest one in a folder; returns its step. Raises
    CheckpointError: no checkpoint, or another model."""
    folder = next((path for _, path in checkpoints(place)), place)
    if not (folder / TRAINER_STATE).is_file():
        raise CheckpointError(f"{place}: no such checkpoint to start from.")
    saved, _ = read_states(folder)
    _load_weights(folder, saved, task)
    if (folder / AVERAGE).is_file():
        assign_strictly(
            task.module, load_state_dict(folder / AVERAGE), folder / AVERAGE, allow_missing=["*"]
        )
    return int(saved["global_step"])


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters."""
    return [
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    ]
