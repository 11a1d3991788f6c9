"""Batches by micro-step: the same for any workers and starts, and after being killed; nothing lost in another world."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def same(left: LlmBatch, right: LlmBatch) -> bool:
    masks = (left.attention_mask, right.attention_mask)
    return (torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)
            and torch.equal(left.position_ids, right.position_ids) and (masks[0] is None) == (masks[1] is None)
            and (masks[0] is None or torch.equal(*masks)) and counts(left) == counts(right))


def counts(batch: LlmBatch) -> tuple[int, int, int, int, int]:
    return batch.tokens, batch.learned, batch.sequences, batch.images, batch.squares


def saved(batches: LlmBatches) -> dict[str, Any]:
    return json.loads(json.dumps(batches.state()))


def test_at_counts_its_sequences(mixed: Callable, words, sequences: Callable, numbers: Callable) -> None:
    batches = LlmBatches(read_data_settings(mixed(rows=3)), words)
    tokens = positions = 0
    for step in range(12):
        batch = batches.at(step)
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 192)
        assert {one.dtype for one in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}
        assert batch.attention_mask is None
        found = sequences(batch)
        assert len(found) == batch.sequences == len(numbers(batch))
        assert sum(len(ids) for ids, _ in found) == batch.tokens
        assert sum(len(ids)**2 for ids, _ in found) == batch.squares
        assert int((batch.labels[:, 1:] != -100).sum()) == batch.learned
        assert sum(ids.count(words.vocabulary.boi_id) for ids, _ in found) == batch.images
        for ids, labels in found:
            assert ids[0] == words.bos_id and ids[-1] == words.eos_id
            assert labels[0] == -100 and labels[1:] == ids[1:]  # all of a pretraining sequence is learned
        tokens, positions = tokens + batch.tokens, positions + batch.input_ids.numel()
    assert batches.report()["fill"] == tokens / positions > 0.8
    assert batches.wait_seconds > 0
    moved = batch.to("cpu")
    assert same(moved, batch)


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
def test_at_with_workers(mixed: Callable, words, packing: bool, no_workers_left: None) -> None:
    settings = read_data_settings(mixed(packing=packing, rows=2))
    alone = LlmBatches(settings, words)
    expected = [alone.at(step) for step in range(40)]
    for workers in (1, 3):
        with LlmBatches(settings, words, workers=workers) as batches:
            for step in range(40):
                state = torch.random.get_rng_state()
                assert same(batches.at(step), expected[step])
                assert torch.equal(torch.random.get_rng_state(), state)
            assert saved(batches) == saved(alone) and batches.report() == alone.report()
            assert 1 <= len(batches.loader.worker_pids()) <= workers


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_restore(mixed: Callable, words, packing: bool, workers: int, no_workers_left: None) -> None:
    settings = read_data_settings(mixed(packing=packing, rows=2))
    whole = LlmBatches(settings, words)
    expected = [whole.at(step) for step in range(70)]
    for stop in (0, 1, 7, 48, 61):
        with LlmBatches(settings, words, workers=workers) as first:
            for step in range(stop):
                first.at(step)
            state = saved(first)
        with LlmBatches(settings, words, workers=workers) as second:
            second.restore([state])
            assert saved(second) == state
            for step in range(stop, stop + 9):
                assert same(second.at(step), expected[step])
            report = second.report()
    again = LlmBatches(settings, words)
    for step in range(70):
        again.at(step)
    assert report == again.report()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_restore_in_another_number_of_processes(mixed: Callable, words, numbers: Callable, packing: bool, before: int,
                                                after: int) -> None:
    """No sample is lost or used twice, also over two changes: every record as often as its cycles."""
    config = mixed(packing=packing, too_long="truncate")
    for source, cycles in zip(config["sources"], (2, 3, 1), strict=True):
        source["cycles"] = cycles
        if not packing:
            source |= {"batch_size": 3, "max_length": 60}
    settings, seen = read_data_settings(config), Counter[int]()
    states: list[dict[str, Any]] = []
    for world, steps in ((before, 5), (after, 4), (before, 1000)):
        ranks = [LlmBatches(settings, words, rank=rank, world=world) for rank in range(world)]
        for batches in ranks:
            if states:
                batches.restore(states[::-1])
            with contextlib.suppress(EndOfData):
                for step in range(500, 500 + steps + batches.rank):  # ranks need not be at the same draw
                    seen.update(numbers(batches.at(step) if states else batches.at(step - 500)))
        states = [saved(batches) for batches in ranks]
    assert seen == {**dict.fromkeys(range(66), 2), **dict.fromkeys(range(1000, 1030), 3),
                    **dict.fromkeys(range(2000, 2035), 1)}
    used = sum(one["sequences"] for state in states for one in state["report"]["sources"])
    assert used == seen.total()


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_at_uses_every_record_once_per_cycle(mixed: Callable, words, numbers: Callable, packing: bool, world: int,
                                             workers: int) -> None:
    config = mixed(rows=2, packing=packing)
    for source, cycles in zip(config["sources"], (2, 3, 1), strict=True):
        source["cycles"] = cycles
    seen: Counter[int] = Counter()
    for rank in range(world):
        with LlmBatches(read_data_settings(config), words, rank=rank, world=world, workers=workers) as batches, \
                pytest.raises(EndOfData, match=r"All sources are used up \(cycles: captions 2x"):
            for step in itertools.count():
                seen.update(numbers(batches.at(step)))
        assert batches.loader.worker_pids() == []
    assert seen == {**dict.fromkeys(range(66), 2), **dict.fromkeys(range(1000, 1030), 3),
                    **dict.fromkeys(range(2000, 2035), 1)}


def test_restore_near_the_end(mixed: Callable, words, numbers: Callable) -> None:
    config = mixed(length=96)
    config["sources"] = [{**config["sources"][2], "cycles": 2}]

    def rest(batches: LlmBatches, first: int) -> list[list[int]]:
        found = []
        with contextlib.suppress(EndOfData):
            for step in itertools.count(first):
                found.append(numbers(batches.at(step)))
        return found

    whole = rest(LlmBatches(read_data_settings(config), words), 0)
    for stop in range(len(whole) - 5, len(whole) + 1):
        first, second = (LlmBatches(read_data_settings(config), words) for _ in range(2))
        assert [numbers(first.at(step)) for step in range(stop)] == whole[:stop]
        second.restore([saved(first)])
        assert rest(second, stop) == whole[stop:]
        assert second.report()["sources"]["texts"]["draws"] == 2 * 35


def test_restore_refuses_other_data(mixed: Callable, words) -> None:
    pair = [LlmBatches(read_data_settings(mixed()), words, rank=rank, world=2) for rank in range(2)]
    states = [saved(batches) for batches in pair]
    with pytest.raises(ConfigError, match=r"needs those of 2 ranks, not of \[0\]"):
        pair[0].restore(states[:1])
    for change in ({"seed": 7}, {"length": 256}, {"packing": False}, {"shuffle_block": 10}):
        with pytest.raises(ConfigError, match=f"saved with {next(iter(change))} "):
            LlmBatches(read_data_settings(mixed(**change)), words).restore(states)
    config = mixed()
    config["sources"] = config["sources"][::-1]
    with pytest.raises(ConfigError, match="saved with source texts .*'number': 2.* now .*'number': 0"):
        LlmBatches(read_data_settings(config), words).restore(states)
    config = mixed()
    config["sources"][0]["weight"] = 9  # the mixture may change on the way
    LlmBatches(read_data_settings(config), words).restore(states)


def test_state_is_small(mixed: Callable, words) -> None:
    batches = LlmBatches(read_data_settings(mixed(length=512)), words)
    batches.at(30)
    del (state := batches.state())["report"]
    assert len(json.dumps(state)) < 3000


# ---- processes that die


@pytest.mark.process
def test_at_after_a_worker_was_killed(mixed: Callable, words, no_workers_left: None) -> None:
    settings = read_data_settings(mixed())
    with LlmBatches(settings, words, workers=2) as batches:
        batches.at(0)
        victim = batches.loader.worker_pids()[1]
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(DataError, match=rf"data worker process \(pid {victim}\) was killed by signal 9") as error:
            for step in range(1, 40):  # what was loaded ahead still comes
                batches.at(step)
        assert "\n" not in str(error.value) and batches.loader.worker_pids() == []


SCRIPT = """
import hashlib, json, os, signal, sys
from pathlib import Path
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.language.tokenizer import MultimodalTokenizer

words = MultimodalTokenizer.from_pretrained(sys.argv[1])
batches = LlmBatches(read_data_settings(json.loads(sys.argv[2])), words, workers=2)
for step in range(100):
    batch = batches.at(step)
    print(step, hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest(), flush=True)
    if step == 12:
        Path(sys.argv[3]).write_text(json.dumps(batches.state()))
    if step == 17:
        print(*batches.loader.worker_pids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_restore_after_sigkill(mixed: Callable, words, tmp_path: Path, still_running: Callable) -> None:
    """A real process with workers, killed five steps after its state was saved; its workers end by themselves."""
    root = Path(__file__).resolve().parents[4]
    config, state = mixed(rows=2), tmp_path / "state.json"
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT,
                             str(root / "pretrained/nano/seed_tokenizer"), json.dumps(config), str(state)],
                            capture_output=True, text=True, timeout=150,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    *lines, workers = killed.stdout.splitlines()
    whole, fresh = (LlmBatches(read_data_settings(config), words) for _ in range(2))
    fresh.restore([json.loads(state.read_text())])
    for step in range(20):
        batch = whole.at(step)
        if step < 18:
            assert lines[step] == f"{step} {hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest()}"
        if step > 12:
            assert same(fresh.at(step), batch)
    assert still_running(workers.split()) == []


@pytest.mark.process
def test_workers_end_with_a_program_that_fails(still_running: Callable) -> None:
    code = """
from seed_multimodal.data.stream.loader import StepLoader

loader = StepLoader(lambda job: job, lambda step: step, workers=2)
print(loader.at(0), loader.at(1), *loader.worker_pids(), flush=True)
raise KeyError("a training that fails")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=150,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1 and "a training that fails" in done.stderr
    first, second, *workers = done.stdout.split()
    assert (first, second) == ("0", "1") and len(workers) == 2 and still_running(workers, 0) == []
