"""The one store of checkpoints: what a checkpoint holds, how it is written, and how a run resumes from it.

    checkpoint-1000/
        model.safetensors                     the weights; a language model's task writes files of its own instead
        ema.safetensors                       their moving average, if one is kept
        optimizer.safetensors                 optimiser and loss scale
        trainer_state.json, data_state.json   step, log, sums; each process's own state
        latest, global_step1000/              DeepSpeed, instead of optimizer.safetensors: every process's shards
        manifest.json                         names, sizes and hashes; last

No random state: the numbers of a step follow from (seed, step, process). States are copied to host memory and written
by the first process, on request in a thread beside the next steps; with DeepSpeed all processes write their shards
before the next step.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.checkpoint_folders import (
    checkpoints,
    clean,
    describe,
    files_of,
    named,
    newest,
    prune,
    publish,
    temporary_folder,
    unwritable,
)
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.failures import TrainingError
from seed_multimodal.training.state_tree import flatten, write_tree
from seed_multimodal.training.task import Task
from seed_multimodal.training.zero import ZeroEngine
from seed_multimodal.weights import save_state_dict

TRAINER_STATE, DATA_STATE = "trainer_state.json", "data_state.json"
OPTIMIZER, AVERAGE = "optimizer.safetensors", "ema.safetensors"


class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        saved, place: step and folder of the last complete one (this run's, or the one it resumed from).
        problem: why the last one could not be written, if so.
    """

    def __init__(self, home: Path, group: ProcessGroup, *, limit: int | None, asynchronous: bool,
                 log: Callable[[str], None], save_frozen: bool = True) -> None:
        self.home, self.group, self.limit, self.asynchronous, self.log = home, group, limit, asynchronous, log
        self.save_frozen = save_frozen
        self.saved: int | None = None
        self.place: Path | None = None
        self.problem: TrainingError | None = None
        self._thread: threading.Thread | None = None
        if group.first:
            clean(home)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to resume from, for `auto`, `never` or a folder; None: start anew.

        Raises:
            CheckpointError: the folder is no checkpoint; `never`, but there are checkpoints; or all are incomplete.
        """
        if resume not in ("auto", "never"):
            self.saved, self.place = named(Path(resume), self.group)
            return self.place
        present = checkpoints(self.home)
        if resume == "never":
            if present:
                raise CheckpointError(f"{self.home}: holds checkpoints of an earlier run (the newest is "
                                      f"{present[0][1].name}); resume from them (resume=auto) or use another folder.")
            return None
        found = newest(self.home, self.group, self.log)
        if found is None:
            if present:
                raise CheckpointError(f"{self.home}: none of its {len(present)} checkpoints is complete; remove them "
                                      "to begin anew.")
            return None
        self.saved, self.place = found
        return self.place

    def description(self) -> str:
        """The last checkpoint in words, for sentences about failures."""
        return "nothing was saved yet" if self.saved is None else (
            f"the last checkpoint ({self.place}) is intact")

    # ------------------------------------------------------------------------------------------------------ writing

    def save(self, step: int, task: Task, engine: Engine, average: Ema | None, state: Mapping[str, Any],
             own: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; all processes call it.

        Args:
            state: for trainer_state.json. own: this process's own state.

        Raises:
            TrainingError: it could not be written; the checkpoints before it are intact.
        """
        self.join()
        if self.problem is not None:
            raise self.problem
        texts = {TRAINER_STATE: dict(state), DATA_STATE: self.group.gather(own)}
        if isinstance(engine, ZeroEngine):
            self._save_shards(step, task, engine, texts)
            return
        gathered, states = engine.weights(), engine.state_dict()
        if self.group.first:
            left_out = set() if self.save_frozen else set(frozen_names(task.module))
            # Copies, taken now: a thread may write while the next steps change the weights.
            weights = {name: value.detach().to("cpu", copy=True) for name, value in task.weights(gathered).items()
                       if name not in left_out}
            shadow = {name: value.to("cpu", copy=True) for name, value in average.shadow.items()} if average else {}
            tree, tensors = flatten(states)

            def fill(folder: Path) -> None:
                task.save_files(folder, weights)
                if shadow:
                    save_state_dict(shadow, folder / AVERAGE)
                write_tree(folder / OPTIMIZER, tree, tensors)
                _write_texts(folder, texts)

            self._thread = threading.Thread(target=self._write, args=(step, fill), name="checkpoint")
            self._thread.start()
        else:
            self._is_saved(step)
        if not self.asynchronous:
            self.finish()

    def join(self) -> None:
        """Wait until the checkpoint being written is on the disk (or has failed: `problem`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the checkpoint being written, in all processes.

        Raises:
            TrainingError: it could not be written.
        """
        self.join()
        if self.group.agree(self.problem is not None)[0]:
            raise self.problem or TrainingError("The first process could not write its checkpoint.")

    def _write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Fill, describe and publish a folder (first process alone)."""
        try:
            folder = temporary_folder(self.home, step)
            fill(folder)
            publish(folder, step, {name: describe(folder, name) for name in files_of(folder)})
            self._is_saved(step)
            prune(self.home, self.limit, step)
        except Exception as error:  # noqa: BLE001 (an exception in a thread would be lost)
            self.problem = unwritable(step, error, self.description())
            clean(self.home)

    def _save_shards(self, step: int, task: Task, engine: ZeroEngine, texts: Mapping[str, Any]) -> None:
        folder = self.home / f".checkpoint-{step}.tmp"
        try:
            if self.group.first:
                temporary_folder(self.home, step)
            self.group.agree(False)  # the folder is there
            engine.save_shards(folder, step)
            weights = engine.weights()
            if self.group.first:
                assert weights is not None
                task.save_files(folder, task.weights(weights))
                _write_texts(folder, texts)
            self.group.agree(False)  # everything is written
            names = files_of(folder)
            own = {name: describe(folder, name) for name in names[self.group.rank::self.group.world]}
            entries = {name: entry for answer in self.group.gather(own) for name, entry in answer.items()}
            if self.group.first:
                publish(folder, step, entries)
                prune(self.home, self.limit, step)
            self.group.agree(False)  # it has its name
        except (OSError, SafetensorError) as error:
            raise unwritable(step, error, self.description()) from error
        except RuntimeError as error:  # torch.save reports only that its file writer failed
            if "write" not in str(error) and "inline_container" not in str(error):
                raise
            raise unwritable(step, error, self.description()) from error
        self._is_saved(step)

    def _is_saved(self, step: int) -> None:
        self.saved, self.place = step, self.home / f"checkpoint-{step}"


def _write_texts(folder: Path, texts: Mapping[str, Any]) -> None:
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1 if name == TRAINER_STATE else None), encoding="utf-8")


def frozen_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]


def frozen_check_sum(module: nn.Module) -> int:
    """CRC of eight values of every parameter that is not trained."""
    own = dict(module.named_parameters(remove_duplicate=False))
    total = 0
    for name in frozen_names(module):
        flat = own[name].detach().flatten()
        places = torch.tensor([i * (len(flat) - 1) // 7 for i in range(8)] if len(flat) else [])
        picked = flat[places.long().to(flat.device)].float().tolist()
        total = zlib.crc32(f"{name}{tuple(own[name].shape)}{picked}".encode(), total)
    return total
