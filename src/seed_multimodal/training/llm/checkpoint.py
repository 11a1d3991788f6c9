"""What a checkpoint of a run holds, how it is written and how a run goes on from it.

    checkpoint-1000/
        adapter_config.json, adapter_model.safetensors    (full fine-tuning: config.json, model*.safetensors)
        tokenizer.model, added_tokens.json, …             the tokenizer's files
        trainer_state.json, data_state.json               step, log, sums; each process's place in the data
        optimizer.safetensors                             plain engine
        latest, global_step1000/                          DeepSpeed: every process's shards
        manifest.json                                     names, sizes and hashes; last

No random state: the numbers of a step follow from (seed, step, process). The plain engine copies to host memory and
writes in a thread beside the next steps; with DeepSpeed all processes write their shards before they go on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
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
from seed_multimodal.training.failures import TrainingError
from seed_multimodal.training.llm.engine import PlainEngine
from seed_multimodal.training.llm.lora import is_lora, load_adapter
from seed_multimodal.training.llm.model import load_trained, save_trained, trained_state
from seed_multimodal.training.llm.processes import RunProcessGroup
from seed_multimodal.training.llm.zero import ZeroEngine
from seed_multimodal.training.state_tree import flatten, read_tree, write_tree
from seed_multimodal.weights import load_state_dict

Engine = PlainEngine | ZeroEngine
_GIVEN = ("betas", "eps", "weight_decay")  # of an optimiser's group; its rate is set at each step
TRAINER_STATE, DATA_STATE, OPTIMIZER = "trainer_state.json", "data_state.json", "optimizer.safetensors"


class Checkpoints:
    """The checkpoints of one output folder.

    Attributes:
        saved, place: step and folder of the last complete one (this run's, or the one it went on from).
        problem: why the last one could not be written, if so.
    """

    def __init__(self, home: Path, peers: RunProcessGroup, *, limit: int | None, asynchronous: bool,
                 log: Callable[[str], None]) -> None:
        self.home, self.peers, self.limit, self.asynchronous, self.log = home, peers, limit, asynchronous, log
        self.saved: int | None = None
        self.place: Path | None = None
        self.problem: TrainingError | None = None
        self._thread: threading.Thread | None = None
        if peers.first:
            clean(home)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to go on from, for `auto`, `never` or a folder; None: begin.

        Raises:
            CheckpointError: the folder is none; `never`, but the output folder has checkpoints; or there are only
                torn ones in it.
        """
        if resume not in ("auto", "never"):
            self.saved, self.place = named(Path(resume), self.peers)
            return self.place
        present = checkpoints(self.home)
        if resume == "never":
            if present:
                raise CheckpointError(f"{self.home}: holds checkpoints of an earlier run (the newest is "
                                      f"{present[0][1].name}); go on from them (resume=auto) or use another folder.")
            return None
        found = newest(self.home, self.peers, self.log)
        if found is None:
            if present:
                raise CheckpointError(f"{self.home}: none of its {len(present)} checkpoints is complete; remove them "
                                      "to begin anew.")
            return None
        self.saved, self.place = found
        return self.place

    def left(self) -> str:
        """What a sentence about a failure says of the disk."""
        return "nothing was saved yet" if self.saved is None else (
            f"the last checkpoint ({self.place}) is intact")

    def save(self, step: int, engine: Engine, llm: Any, tokenizer: MultimodalTokenizer, state: Mapping[str, Any],
             place: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; all processes call it.

        Args:
            llm: the model inside the engine.
            state: for trainer_state.json.
            place: of this process in the data.

        Raises:
            TrainingError: it could not be written; the checkpoints before it are intact.
        """
        self.join()
        if self.problem is not None:
            raise self.problem
        places = self.peers.gather(place)
        if isinstance(engine, ZeroEngine):
            self._save_sharded(step, engine, llm, tokenizer, state, places)
            return
        if self.peers.first:
            # Copies, taken now: the thread writes while the next steps change the weights.
            weights = {name: value.to("cpu", copy=True) for name, value in trained_state(llm).items()}
            tree, tensors = flatten({"optimizer": engine.optimizer.state_dict(), "scaler": engine.scaler.state_dict()})

            def fill(folder: Path) -> None:
                _write_common(folder, llm, tokenizer, state, places, weights)
                write_tree(folder / OPTIMIZER, tree, tensors)

            self._thread = threading.Thread(target=self._write, args=(step, fill), name="checkpoint")
            self._thread.start()
        else:
            self._is_saved(step)
        if not self.asynchronous:
            self.finish()

    def join(self) -> None:
        """Wait until the checkpoint under way is on the disk (or has failed: `problem`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the checkpoint under way, in all processes.

        Raises:
            TrainingError: it could not be written.
        """
        self.join()
        if self.peers.agree(self.problem is not None)[0]:
            raise self.problem or TrainingError("The first process could not write its checkpoint.")

    def _write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Fill, describe and publish a folder (first process alone)."""
        try:
            folder = temporary_folder(self.home, step)
            fill(folder)
            publish(folder, step, {name: describe(folder, name) for name in files_of(folder)})
            self._is_saved(step)
            prune(self.home, self.limit, step)
        except Exception as error:  # noqa: BLE001 (in a thread nobody else would hear of it)
            self.problem = unwritable(step, error, self.left())
            clean(self.home)

    def _save_sharded(self, step: int, engine: ZeroEngine, llm: Any, tokenizer: MultimodalTokenizer,
                      state: Mapping[str, Any], places: list[dict[str, Any]]) -> None:
        folder = self.home / f".checkpoint-{step}.tmp"
        try:
            if self.peers.first:
                temporary_folder(self.home, step)
            self.peers.agree(False)  # the folder is there
            engine.save(folder, step)
            weights = engine.consolidated()
            if self.peers.first:
                assert weights is not None
                _write_common(folder, llm, tokenizer, state, places, _by_file_name(llm, weights))
            self.peers.agree(False)  # everything is written
            names = files_of(folder)
            own = {name: describe(folder, name) for name in names[self.peers.rank::self.peers.world]}
            entries = {name: entry for answer in self.peers.gather(own) for name, entry in answer.items()}
            if self.peers.first:
                publish(folder, step, entries)
                prune(self.home, self.limit, step)
            self.peers.agree(False)  # it has its name
        except (OSError, SafetensorError) as error:
            raise unwritable(step, error, self.left()) from error
        except RuntimeError as error:  # torch.save says only that its file writer failed
            if "write" not in str(error) and "inline_container" not in str(error):
                raise
            raise unwritable(step, error, self.left()) from error
        self._is_saved(step)

    def _is_saved(self, step: int) -> None:
        self.saved, self.place = step, self.home / f"checkpoint-{step}"


def _write_common(folder: Path, llm: Any, tokenizer: MultimodalTokenizer, state: Mapping[str, Any],
                  places: list[dict[str, Any]], weights: Mapping[str, Any]) -> None:
    """Everything but the optimiser."""
    save_trained(llm, folder, weights)
    tokenizer.save_pretrained(folder)
    (folder / TRAINER_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    (folder / DATA_STATE).write_text(json.dumps(places), encoding="utf-8")


def _by_file_name(llm: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's trained weights under the names that `trained_state` gives them."""
    prefix = "llm."
    found = {name.removeprefix(prefix): value for name, value in weights.items()}
    if not is_lora(llm):
        return found
    short = {name.replace(".default", "").replace(".modules_to_save", ""): value for name, value in found.items()}
    wanted = trained_state(llm)
    missing = [name for name in wanted if name not in short]
    if missing:
        raise TrainingError(f"DeepSpeed's state lacks {len(missing)} trained tensors, first {missing[0]!r}.")
    return {name: short[name] for name in wanted}


def read_states(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """trainer_state.json, and every process's place in the data.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    found = []
    for name in (TRAINER_STATE, DATA_STATE):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: is not there or not readable, so this is no checkpoint to resume "
                                  "from.") from error
    return found[0], found[1]


def load_weights(folder: Path, llm: Any) -> None:
    """Fill a model, before an engine takes it, with a checkpoint's trained weights.

    Raises:
        CheckpointError: weights of another model.
    """
    if is_lora(llm):
        load_adapter(llm, folder)
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no model*.safetensors; was it trained with LoRA?")
    state = {name: value for file in files for name, value in load_state_dict(file).items()}
    load_trained(llm, state, str(folder))


def load_engine(folder: Path, step: int, engine: Engine) -> None:
    """Fill an engine's optimiser (and DeepSpeed's weights); all processes call it.

    Torch restores hyperparameters (weight decay, betas) with the moments; this run's settings win here.

    Raises:
        CheckpointError: a state of another optimiser.
    """
    own = [{key: value for key, value in group.items() if key in _GIVEN} for group in engine.optimizer.param_groups]
    if isinstance(engine, ZeroEngine):
        engine.load(folder, step)
    else:
        state = read_tree(folder / OPTIMIZER)
        try:
            engine.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: holds the state of another optimiser ({error}).") from error
        if state["scaler"]:
            engine.scaler.load_state_dict(state["scaler"])
    for group, given in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(given)
