"""Checkpoints of a run: layout, atomic writing, resuming.

    checkpoint-1000/
        model.safetensors                weights; language models' tasks write other files instead
        trained.safetensors              with `trainer.ema`: the trained weights; all other files
                                         hold the averaged ones, which are the result
        optimizer.pt                     optimizer and loss scale (tensors, plain containers)
        latest, global_step1000/         DeepSpeed instead of optimizer.pt: shards of all processes
        data_state.json                  data position of each process
        trainer_state.json               step, log, settings; `kept`: by the schedule, or the end;
                                         `files`: the others

A checkpoint is written to `.checkpoint-N.tmp`, flushed and renamed, so a folder with the final name
is complete. `save_total_limit` counts those that are kept; others, of `save_seconds` and of stops,
are replaced by the next. No random state is saved: random numbers of a step are determined by
(seed, step, process).
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from seed_multimodal.disk import (
    JsonObject,
    disk_reason,
    flush,
    replace_json,
    strict_json,
    writing,
)
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.fingerprints import fingerprint, same_fingerprint
from seed_multimodal.settings import changed_settings
from seed_multimodal.state_dicts import copy_weights, load_state_dict, save_state_dict, save_torch
from seed_multimodal.training.config import ConfigNode, TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.engine import OPTIMIZER_FILE, Engine
from seed_multimodal.training.optimizers import Ema, averaged_weights, trained_parameters
from seed_multimodal.training.task import Task
from seed_multimodal.training.zero_engine import ZeroEngine

TRAINER_STATE = "trainer_state.json"
DATA_STATE = "data_state.json"
TRAINED_FILE = "trained.safetensors"
BASE = "base (set of frozen weights)"
MAX_LISTED_CHANGES = 8
Tree = TypeVar("Tree")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a folder, newest first."""
    steps = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            steps.append((int(number), path))
    return sorted(steps, reverse=True)


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in a folder; the folder itself if it has none."""
    return next((checkpoint for _, checkpoint in checkpoints(folder)), folder)


@dataclass
class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        last_step, last_folder: of the checkpoint written or resumed from last.
        writing: of a checkpoint in this process, for which `wait` waits.
        branch: the checkpoint of another run that this run was started from by `resume`, or "".
    """

    folder: Path
    group: ProcessGroup
    settings: TrainerSettings
    log: Callable[[str], None]
    last_step: int | None = None
    last_folder: Path | None = None
    branch: str = ""
    writing: Future[None] | None = None
    _step: int | None = None  # of the checkpoint in writing, equal in all processes

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        if self.group.first:  # of a killed run
            for path in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------------------------- resuming

    def find(self) -> tuple[JsonObject, list[JsonObject]]:
        """The states (as `read_states`) of the checkpoint to resume from, or empty.

        Raises CheckpointError: checkpoints of another run exist, or `never` and any exist.
        """
        # All processes use the first one's choice.
        newest = next((path for _, path in checkpoints(self.folder)), None)
        folder = self.group.gather({"folder": str(newest or "")})[0]["folder"]
        resume = self.settings.resume
        if resume == "never" and folder:
            raise CheckpointError(
                f"{self.folder}: contains checkpoints of an earlier run (the newest is "
                f"{Path(folder).name}); resume from them (resume=auto) or use another folder."
            )
        if resume not in ("auto", "never") and Path(resume).resolve() != Path(folder).resolve():
            # The same command again continues the run that it has started.
            self.branch = str(Path(resume).resolve())
            if not folder:
                folder = resume
            elif read_states(Path(folder))[0].get("branch") != self.branch:
                raise CheckpointError(
                    f"{self.folder}: contains checkpoints that {resume} is not continued by (the "
                    f"newest is {Path(folder).name}); set another output folder."
                )
        if not folder:
            return {}, []

        self.last_folder = Path(folder)
        with self.reading():
            trainer_state, process_states = read_states(self.last_folder)
            check_files(self.last_folder, trainer_state)
        self.last_step = int(trainer_state["global_step"])
        self.branch = self.branch or trainer_state.get("branch", "")
        return trainer_state, process_states

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context that reads the checkpoint to resume from.

        Raises CheckpointError: it is damaged; names the newest intact one before it.
        """
        try:
            yield
        except CheckpointError as error:
            damaged = self.last_folder
            if damaged is None or is_intact(damaged):
                raise
            for _, folder in checkpoints(damaged.parent):
                if is_intact(folder):
                    advice = f"{folder.name} is intact: remove {damaged} to resume from it."
                    raise CheckpointError(f"{error} {advice}") from error
            raise

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
        self.wait()
        states = {DATA_STATE: self.group.gather(process_state), TRAINER_STATE: trainer_state}
        self._step = step
        if isinstance(engine, ZeroEngine):
            # Every process writes its shard.
            self.writing = Future()
            try:
                self._write(
                    step, lambda folder: self._fill_shards(folder, step, task, engine), states
                )
                self.writing.set_result(None)
            except TrainingError as error:
                self.writing.set_exception(error)
            self.wait()
        elif self.group.first:
            # Copies, since a thread may write while the next steps update the weights.
            trained: dict[str, Tensor] = {}
            if ema is not None:
                trained = _copy_to_cpu(ema.parameters(task.module))
            with averaged_weights(ema, task.module):
                weights = _copy_to_cpu(task.published(engine.weights()))
            optimizer = _copy_to_cpu(engine.state_dict())

            def fill(folder: Path) -> None:
                task.save(folder, weights)
                if trained:
                    save_state_dict(trained, folder / TRAINED_FILE)
                save_torch(optimizer, folder / OPTIMIZER_FILE)

            self.writing = self._pool.submit(self._write, step, fill, states)
        if not self.settings.async_save:
            self.wait()

    def wait(self) -> None:
        """Wait in all processes until the checkpoint is written; collective.

        Raises TrainingError: writing failed.
        """
        if self._step is None:
            return
        step, self._step = self._step, None
        pending, self.writing = self.writing, None
        error = pending.exception() if pending is not None else None
        failed = self.group.agree(error is not None)[0]
        if error is not None:
            raise error
        if failed:
            raise TrainingError(
                f"The first process could not write the checkpoint of step {step}; "
                f"{self.description()}."
            )
        self.last_step = step
        self.last_folder = self.folder / f"checkpoint-{step}"

    def close(self) -> None:
        """Wait for the writing in this process, whatever its end."""
        self._pool.shutdown()

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

    def _fill_shards(self, folder: Path, step: int, task: Task, engine: ZeroEngine) -> None:
        self.group.agree(False)  # wait until the folder exists
        engine.save_shards(folder, step)
        weights = engine.weights()
        if self.group.first:
            task.save(folder, task.published(weights))
        self.group.agree(False)  # wait until all shards are written

        # A node whose disk is not the shared one has written elsewhere.
        n_shards = len(list(folder.glob(f"global_step{step}/*optim_states.pt")))
        if self.group.first and n_shards != self.group.world:
            raise OSError(
                f"the folder has the shards of {n_shards} of {self.group.world} processes; all "
                "nodes must write to one shared folder"
            )

    def _publish(self, folder: Path, step: int, states: Mapping[str, Any]) -> None:
        """Flush a complete folder, rename it, and remove the oldest."""
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name, state in states.items():
            if name == TRAINER_STATE:
                state = {**state, "files": files}
            (folder / name).write_text(strict_json(state), encoding="utf-8")
        for path in folder.rglob("*"):
            if path.is_file():
                flush(path)
        os.replace(folder, self.folder / f"checkpoint-{step}")
        flush(self.folder)
        self._remove_older(step)

    def _remove_older(self, step: int) -> None:
        """Remove those before a new checkpoint that are not kept, or that exceed the limit."""
        limit = self.settings.save_total_limit
        n_retained = 1  # the new one counts, too
        for saved_step, path in checkpoints(self.folder):
            if saved_step >= step:
                continue
            is_kept = _is_kept(path)
            if is_kept and (limit is None or n_retained < limit):
                n_retained += 1
                continue
            # Renamed first, so that a partly removed folder is not a checkpoint.
            removed = path.with_name(f".{path.name}.old")
            os.replace(path, removed)
            shutil.rmtree(removed, ignore_errors=True)
            reason = f"save_total_limit is {limit}" if is_kept else "it was saved between others"
            self.log(f"{path} is removed: {reason}.")

    def keep_last(self) -> None:
        """Keep the last checkpoint, as the end of a run."""
        folder = self.last_folder
        if self.group.first and folder is not None and not _is_kept(folder):
            file = folder / TRAINER_STATE
            with writing(file):
                replace_json(file, {**_read_state(file), "kept": True})


def _copy_to_cpu(tree: Tree) -> Tree:
    """A copy of nested containers, their tensors on the CPU."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    return pytree.tree_map_only(Tensor, copy, tree)


def _is_write_error(error: RuntimeError) -> bool:
    """Whether torch or safetensors failed to write a file; they raise RuntimeErrors with these
    texts."""
    return "write" in str(error) or "inline_container" in str(error)


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


def check_files(folder: Path, trainer_state: JsonObject) -> None:
    """Raise CheckpointError if a file is missing, as in an incomplete copy."""
    for name in trainer_state.get("files", ()):  # earlier versions have no list
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing.")


def _is_kept(folder: Path) -> bool:
    """Whether a checkpoint was saved to be kept; those of earlier versions were."""
    try:
        return bool(_read_state(folder / TRAINER_STATE).get("kept", True))
    except CheckpointError:  # its age is no reason to remove it
        return True


def is_intact(folder: Path) -> bool:
    """Whether the states, weights and optimizer of a checkpoint can be opened."""
    weights = [*folder.rglob("*.safetensors")]
    optimizer = [*folder.rglob("*.pt")]
    try:
        check_files(folder, read_states(folder)[0])
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (CheckpointError, OSError, SafetensorError):
        return False
    return bool(weights and optimizer) and all(map(zipfile.is_zipfile, optimizer))


def resume_remarks(folder: Path, saved: JsonObject, task: Task, world: int) -> list[str]:
    """Remarks on allowed differences between a checkpoint's and this run's identity and settings.

    Raises CheckpointError: this run cannot resume from it.
    """
    identity = task.identity(world)
    before = saved.get("identity", saved)  # earlier versions: one mapping
    for key, value in identity.fixed.items():
        if before.get(key) != value:
            noun = key.replace("_", " ")
            changes = changed_settings({noun: before.get(key)}, {noun: value})
            raise CheckpointError(
                f"{folder}: changed since it was saved: {'; '.join(changes)}; use the same, or "
                f"start from its weights ({task.start_hint}) in a new folder."
            )
    remarks = [
        f"the checkpoint was saved with {before.get(key)} {key.replace('_', ' ')}, this run "
        f"has {value}."
        for key, value in identity.reported.items()
        if before.get(key) != value
    ]
    return [*remarks, settings_remark(saved["config"], task.config, task.quiet_keys)]


def settings_remark(
    saved: ConfigNode | None, current: ConfigNode | None, quiet_keys: Sequence[str]
) -> str:
    """A sentence about the differences that `changed_settings` finds, or ""."""
    if not saved or not current:
        return ""
    changes = changed_settings(saved, current, quiet_keys)
    if not changes:
        return ""
    listed = changes[:MAX_LISTED_CHANGES]
    if len(changes) > MAX_LISTED_CHANGES:
        listed.append(f"{len(changes) - MAX_LISTED_CHANGES} more")
    return f"settings changed since the checkpoint: {'; '.join(listed)}."


# -------------------------------------------------------------------------- what is saved of a task


def check_all_saved(task: Task) -> None:
    """Raise CheckpointError if a checkpoint would lack a parameter that the optimizer changes."""
    saved = {weight.data_ptr() for weight in task.published(task.module.state_dict()).values()}
    names = {parameter: name for name, parameter in task.module.named_parameters()}
    for group in task.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.data_ptr() not in saved:
                raise CheckpointError(
                    f"{names.get(parameter, 'a parameter')}: is trained, but would not be saved "
                    f"in the checkpoints of {task.name}."
                )


def frozen_state(task: Task) -> dict[str, str]:
    """Name → fingerprint of all that the training reads and does not change."""
    return {BASE: fingerprint(task.module, frozen=True), **task.frozen_models}


def load_task(folder: Path, saved: JsonObject, task: Task, frozen: Mapping[str, str]) -> None:
    """Load a checkpoint's weights into a task's module before the engine wraps it.

    frozen: this run's `frozen_state`.

    Raises CheckpointError: another model, or other frozen weights or models.
    """
    for name, values in frozen.items():
        saved_values = saved["frozen"].get(name)
        if saved_values is not None and not same_fingerprint(saved_values, values):
            raise CheckpointError(
                f"{folder}: was trained with another {name}; use the same one, or "
                f"start from its weights in a new folder ({task.start_hint})."
            )
    task.load(folder)


def load_unaveraged(folder: Path, module: nn.Module) -> None:
    """Load the trained weights of a run with `trainer.ema`, whose other files hold averaged ones.

    Raises CheckpointError: of other parameters.
    """
    file = folder / TRAINED_FILE
    if file.is_file():
        copy_weights(trained_parameters(module), load_state_dict(file), str(file))


def warm_start(path: Path, task: Task) -> int:
    """Load the (averaged) weights of a checkpoint, or of the newest one in a folder; returns its
    step.

    Raises CheckpointError: no checkpoint, or another model.
    """
    folder = newest_checkpoint(path)
    if not (folder / TRAINER_STATE).is_file():
        raise CheckpointError(f"{path}: no such checkpoint to start from.")
    task.load(folder)
    return int(read_states(folder)[0]["global_step"])
