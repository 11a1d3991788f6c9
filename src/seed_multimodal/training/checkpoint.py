"""Checkpoints of a run: layout, atomic writing, resuming.

    checkpoint-1000/
        model.safetensors                weights; language models' tasks write other files instead
        ema.safetensors                  their moving average, if enabled
        optimizer.pt                     optimizer and loss scale (tensors, plain containers)
        latest, global_step1000/         DeepSpeed instead of optimizer.pt: shards of all processes
        data_state.json                  data position of each process
        trainer_state.json               step, log, settings

A checkpoint is written to `.checkpoint-N.tmp`, flushed and renamed, so a folder with the final name
is complete. No random state is saved: random numbers of a step are determined by (seed, step,
process).
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
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from seed_multimodal.disk import (
    JsonObject,
    disk_reason,
    flush,
    read_json_object,
    replace_folder,
    writing,
)
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.settings import changed_settings
from seed_multimodal.state_dicts import (
    assign_strictly,
    fingerprint,
    load_state_dict,
    same_fingerprint,
    save_state_dict,
    save_torch,
)
from seed_multimodal.training.config import ConfigNode, TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.engine import OPTIMIZER_FILE, Engine, ZeroEngine
from seed_multimodal.training.optimizers import Ema
from seed_multimodal.training.task import Task

TRAINER_STATE = "trainer_state.json"
DATA_STATE = "data_state.json"
EMA_FILE = "ema.safetensors"
FROZEN = "set of frozen weights"
MAX_LISTED_CHANGES = 8
Tree = TypeVar("Tree")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a folder, newest first."""
    steps = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and (path / TRAINER_STATE).is_file():
            steps.append((int(number), path))
    return sorted(steps, reverse=True)


class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        last_step, last_folder: of the checkpoint written or resumed from last.
        branch: the checkpoint named by `resume` from which this branch of the run started, or "".
        starts_branch: whether this process starts the branch.
    """

    def __init__(self, folder: Path, group: ProcessGroup, settings: TrainerSettings) -> None:
        self.folder = folder
        self.group = group
        self.settings = settings
        self.last_step: int | None = None
        self.last_folder: Path | None = None
        self.branch = ""
        self.starts_branch = False
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if group.first:
            _remove_incomplete(folder)

    # ------------------------------------------------------------------------------------- resuming

    def find(self) -> tuple[JsonObject, list[JsonObject]]:
        """The states (as `read_states`) of the checkpoint to resume from, or empty: the newest one
        of this branch.

        Raises CheckpointError: `never` but checkpoints exist, or processes see different files.
        """
        resume = self.settings.resume
        newest = next((path for _, path in checkpoints(self.folder)), None)
        if resume == "never" and newest is not None:
            raise CheckpointError(
                f"{self.folder}: contains checkpoints of an earlier run (the newest is "
                f"{newest.name}); resume from them (resume=auto) or use another folder."
            )
        choice: JsonObject = {"folder": str(newest or ""), "branch": "", "is_new": False}
        if resume not in ("auto", "never"):
            choice["branch"] = self._branch_name(Path(resume))
            # The same command again continues the branch that it has started.
            if newest is None or read_states(newest)[0].get("branch") != choice["branch"]:
                choice["folder"] = resume
                choice["is_new"] = True

        # All processes use the first one's choice.
        choice = self.group.gather(choice)[0]
        if not choice["folder"]:
            return {}, []
        self.last_folder = Path(choice["folder"])
        trainer_state, process_states = read_states(self.last_folder)
        self.last_step = int(trainer_state["global_step"])
        self.branch = choice["branch"] or trainer_state.get("branch", "")
        self.starts_branch = choice["is_new"]
        return trainer_state, process_states

    def _branch_name(self, start: Path) -> str:
        """The checkpoint that a branch starts from: its name if it is one of this run, else its
        path."""
        start = start.resolve()
        return start.name if start.parent == self.folder.resolve() else str(start)

    def set_aside(self) -> str:
        """At the start of a branch, move the checkpoints that are not before it to a folder
        `abandoned-N`.

        Returns a sentence about them, or "". Raises CheckpointError: disk error.
        """
        if not (self.starts_branch and self.group.first and self.last_step is not None):
            return ""
        # A branch that starts from another run's checkpoint abandons all checkpoints of this
        # folder.
        start = self.folder / f"checkpoint-{self.last_step}"
        last_common_step = self.last_step if self.branch == self._branch_name(start) else -1
        abandoned = [path for step, path in checkpoints(self.folder) if step > last_common_step]
        if not abandoned:
            return ""
        index = 1
        while (self.folder / f"abandoned-{index}").exists():
            index += 1
        target = self.folder / f"abandoned-{index}"
        with writing(target):
            target.mkdir()
            for path in abandoned:
                os.replace(path, target / path.name)
        names = ", ".join(path.name for path in reversed(abandoned))
        return f"starts a branch; {names} were moved to {target}."

    def description(self) -> str:
        """The last checkpoint, for error messages."""
        if self.last_step is None:
            return "nothing was saved yet"
        return f"the last checkpoint ({self.last_folder}) is intact"

    # --------------------------------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        task: Task,
        engine: Engine,
        ema: Ema | None,
        trainer_state: JsonObject,
        process_state: JsonObject,
    ) -> None:
        """Write a checkpoint; collective.

        Raises TrainingError: this or the previous one could not be written.
        """
        self.finish()
        states = {DATA_STATE: self.group.gather(process_state), TRAINER_STATE: trainer_state}
        if isinstance(engine, ZeroEngine):
            self._write(step, lambda folder: self._write_shards(folder, step, task, engine), states)
            return
        if not self.group.first:
            self._set_last(step)
            return

        # 1. Copy everything, since a thread may write while the next steps update the weights.
        weights = task.weights()
        if not self.settings.save_frozen:
            for name in frozen_names(task.module):
                weights.pop(name, None)
        weights = _copy_to_cpu(weights)
        shadow = _copy_to_cpu(ema.shadow if ema else {})
        optimizer = _copy_to_cpu(engine.state_dict())

        # 2. Write the copies.
        def fill(folder: Path) -> None:
            task.save_files(folder, weights)
            if shadow:
                save_state_dict(shadow, folder / EMA_FILE)
            save_torch(optimizer, folder / OPTIMIZER_FILE)

        self._pending = self._pool.submit(self._write, step, fill, states)
        if not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written. Raises TrainingError: writing failed."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise as `finish`, without waiting."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def _set_last(self, step: int) -> None:
        self.last_step = step
        self.last_folder = self.folder / f"checkpoint-{step}"

    def _write(self, step: int, fill: Callable[[Path], None], states: Mapping[str, object]) -> None:
        """Fill a folder and rename it; in all processes if the engine is sharded, else in the
        first."""
        folder = self.folder / f".checkpoint-{step}.tmp"
        try:
            if self.group.first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            fill(folder)
            if self.group.first:
                self._publish(folder, step, states)
        except Exception as error:
            if isinstance(error, RuntimeError) and not _is_write_error(error):
                raise
            reason = disk_reason(error) if isinstance(error, OSError) else first_line(error)
            # torch.save does not report a full disk, so the message has the free space.
            free_mib = shutil.disk_usage(self.folder).free / 2**20
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"The checkpoint of step {step} cannot be written: {reason} ({free_mib:,.0f} MiB "
                f"of the disk are free); {self.description()}."
            ) from error
        self._set_last(step)

    def _write_shards(self, folder: Path, step: int, task: Task, engine: ZeroEngine) -> None:
        self.group.agree(False)  # wait until the folder exists
        engine.save_shards(folder, step)
        weights = engine.weights()
        if self.group.first:
            task.save_files(folder, task.weights(weights))
        self.group.agree(False)  # wait until all shards are written

    def _publish(self, folder: Path, step: int, states: Mapping[str, object]) -> None:
        """Flush a complete folder, rename it, and remove the oldest."""
        for name, state in states.items():
            (folder / name).write_text(json.dumps(state), encoding="utf-8")
        for path in folder.rglob("*"):
            if path.is_file():
                flush(path)
        replace_folder(folder, self.folder / f"checkpoint-{step}")
        flush(self.folder)

        # Of the earlier ones keep the newest that `save_steps` scheduled; this one counts, too.
        limit = self.settings.save_total_limit
        n_retained = 1
        for saved_step, path in checkpoints(self.folder):
            if saved_step >= step:
                continue
            if not _is_interim(path) and (limit is None or n_retained < limit):
                n_retained += 1
                continue
            # Renamed first, so that a partly removed folder is not a checkpoint.
            removed = path.with_name(f".{path.name}.old")
            os.replace(path, removed)
            shutil.rmtree(removed, ignore_errors=True)


def _copy_to_cpu(tree: Tree) -> Tree:
    """A copy of nested containers, their tensors on the CPU."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    copied: Tree = pytree.tree_map_only(Tensor, copy, tree)
    return copied


def _is_write_error(error: RuntimeError) -> bool:
    """Whether torch or safetensors failed to write a file; they raise RuntimeErrors with these
    texts."""
    return "write" in str(error) or "inline_container" in str(error)


def _is_interim(checkpoint: Path) -> bool:
    return bool(read_json_object(checkpoint / TRAINER_STATE).get("interim"))


def _remove_incomplete(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run, and restore one that was being replaced."""
    for path in sorted(folder.glob(".checkpoint-*")):
        match = re.fullmatch(r"\.(checkpoint-\d+)\.(tmp|(\d+\.)?old)", path.name)
        if match is None:
            continue
        # `.checkpoint-N.PID.old` was being replaced by a new checkpoint of the same step.
        name, _, was_replaced = match.groups()
        if was_replaced and not (folder / name).exists():
            os.replace(path, folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


# ----------------------------------------------------------------------------------------- resuming


def read_states(folder: Path) -> tuple[JsonObject, list[JsonObject]]:
    """States of the trainer and of the processes in a checkpoint.

    Raises CheckpointError: missing.
    """
    return _read_state(folder / TRAINER_STATE), _read_state(folder / DATA_STATE)


def _read_state(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: missing or not readable, so this is no checkpoint to resume from."
        ) from error


def settings_remark(
    saved: ConfigNode | None, current: ConfigNode | None, quiet_keys: Sequence[str]
) -> str:
    """A message without full stop about the differences that `changed_settings` finds, or ""."""
    if not saved or not current:
        return ""
    changes = changed_settings(saved, current, quiet_keys)
    if not changes:
        return ""
    listed = changes[:MAX_LISTED_CHANGES]
    if len(changes) > MAX_LISTED_CHANGES:
        listed.append(f"{len(changes) - MAX_LISTED_CHANGES} more")
    return f"settings changed since the checkpoint: {'; '.join(listed)}"


def load_task(folder: Path, saved: JsonObject, task: Task) -> None:
    """Load a checkpoint's weights into a task's module before the engine wraps it; frozen weights
    must be set.

    Raises CheckpointError: another model, or other frozen weights or models.
    """
    _load_weights(folder, saved, task)
    current = frozen_state(task, save_frozen=False)
    for name, saved_fingerprint in saved["frozen"].items():
        if name in current and not same_fingerprint(saved_fingerprint, current[name]):
            raise CheckpointError(
                f"{folder}: was trained with another {name}; use the same one, or "
                f"start from its weights in a new folder ({task.start_hint})."
            )


def frozen_state(task: Task, save_frozen: bool) -> dict[str, Sequence[float]]:
    """Name -> fingerprint of the frozen weights that checkpoints do not contain."""
    state = dict(task.frozen_models())
    if not save_frozen:
        state[FROZEN] = fingerprint(task.module, frozen=True)
    return state


def _load_weights(folder: Path, saved: JsonObject, task: Task) -> None:
    allow_missing: list[str] = []
    if FROZEN in saved["frozen"]:
        allow_missing = [glob.escape(name) for name in frozen_names(task.module)]
    task.load_weights(folder, allow_missing)


def load_ema(folder: Path, ema: Ema) -> None:
    """Load a moving average; without its file it starts from the current weights.

    Raises CheckpointError.
    """
    if not (folder / EMA_FILE).is_file():
        return
    saved = load_state_dict(folder / EMA_FILE)
    if saved.keys() != ema.shadow.keys():
        raise CheckpointError(
            f"{folder}: its averaged weights are of other trained parameters ({len(saved)} "
            f"tensors, this run trains {len(ema.shadow)})."
        )
    for name, value in saved.items():
        ema.shadow[name].copy_(value)


def warm_start(path: Path, task: Task) -> int:
    """Load the (averaged) weights of a checkpoint, or of the newest one in a folder; returns its
    step.

    Raises CheckpointError: no checkpoint, or another model.
    """
    folder = next((checkpoint for _, checkpoint in checkpoints(path)), path)
    if not (folder / TRAINER_STATE).is_file():
        raise CheckpointError(f"{path}: no such checkpoint to start from.")
    saved, _ = read_states(folder)
    _load_weights(folder, saved, task)
    ema_file = folder / EMA_FILE
    if ema_file.is_file():
        # The average has trained weights only.
        assign_strictly(task.module, load_state_dict(ema_file), ema_file, allow_missing=["*"])
    return int(saved["global_step"])


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if not parameter.requires_grad]
