"""Batches by micro-step: the same for any workers, ranks, starts and world sizes, and after being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def same(left: LlmBatch, right: LlmBatch) -> bool:
    masks = (left.attention_mask, right.attention_mask)
    return (torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)
            and torch.equal(left.position_ids, right.position_ids) and (masks[0] is None) == (masks[1] is None)
            and (masks[0] is None or torch.equal(*masks)) and counts(left) == counts(right))


def counts(batch: LlmBatch) -> tuple[int, int, int, int, int]:
    return batch.tokens, batch.learned, batch.sequences, batch.images, batch.squares


def joined(batches: list[LlmBatch]) -> LlmBatch:
    return LlmBatch(*(torch.cat([getattr(batch, name) for batch in batches])
                      for name in ("input_ids", "labels", "position_ids")), None,
                    *(sum(one) for one in zip(*map(counts, batches), strict=True)))


def saved(batches: LlmBatches) -> dict[str, Any]:
    return json.loads(json.dumps(batches.state()))


def test_a_batch_is_what_it_says(mixed: Callable, words, sequences: Callable, numbers: Callable) -> None:
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
    assert batches.statistics.fill == tokens / positions > 0.8
    assert batches.wait_seconds > 0
    moved = batch.to("cpu")
    assert same(moved, batch)


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
def test_workers_change_nothing(mixed: Callable, words, packing: bool, no_workers_left: None) -> None:
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
            assert 1 <= len(batches.worker_pids()) <= workers


@pytest.mark.parametrize("rows", [1, 3])
def test_ranks_together_are_one_rank_with_more_micro_steps(mixed: Callable, words, rows: int) -> None:
    settings = read_data_settings(mixed(rows=rows))
    single = LlmBatches(settings, words)
    micro = [single.at(step) for step in range(16)]
    for world in (2, 4):
        ranks = [LlmBatches(settings, words, rank=rank, world=world) for rank in range(world)]
        for step in range(16 // world):
            for rank, batches in enumerate(ranks):
                assert same(batches.at(step), micro[step * world + rank])
    wide = LlmBatches(read_data_settings(mixed(rows=2 * rows)), words)
    for step in range(8):
        assert same(wide.at(step), joined(micro[2 * step:2 * step + 2]))


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_stood(mixed: Callable, words, packing: bool, workers: int,
                                      no_workers_left: None) -> None:
    settings = read_data_settings(mixed(packing=packing, rows=2))
    whole = LlmBatches(settings, words)
    expected = [whole.at(step) for step in range(70)]
    for stop in (0, 1, 7, 48, 61):  # 24 steps use all lanes once
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
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2), (3, 5)])
def test_another_world_size_continues_the_same_stream(mixed: Callable, words, packing: bool, before: int,
                                                      after: int) -> None:
    """Also where the lanes (48) are no multiple of the new world, or the position none of its stride."""
    settings = read_data_settings(mixed(packing=packing))
    single = LlmBatches(settings, words)
    steps = 20
    expected = [single.at(step) for step in range(before * steps + after * 12)]
    ranks = [LlmBatches(settings, words, rank=rank, world=before) for rank in range(before)]
    for step in range(steps):
        for rank, batches in enumerate(ranks):
            assert same(batches.at(step), expected[step * before + rank])
    states = [saved(batches) for batches in ranks]
    fresh = [LlmBatches(settings, words, rank=rank, world=after) for rank in range(after)]
    for batches in fresh:
        batches.restore(states[::-1])
    for step in range(12):
        for rank, batches in enumerate(fresh):
            assert same(batches.at(500 + step), expected[before * steps + step * after + rank])  # any number goes on
    twice = [saved(batches) for batches in fresh]  # and once more, to one process
    last = LlmBatches(settings, words)
    last.restore(twice)
    place = before * steps + after * 12
    assert same(last.at(place), single.at(place))
    used = sum(one["sequences"] for batches in fresh for one in batches.report()["sources"].values())
    assert used == sum(batch.sequences for batch in expected)  # nothing counted twice or lost


def test_other_rows_per_step_continue_the_same_stream(mixed: Callable, words) -> None:
    one = LlmBatches(read_data_settings(mixed()), words)
    expected = [one.at(step) for step in range(30)]
    first = LlmBatches(read_data_settings(mixed()), words)
    for step in range(10):
        first.at(step)
    wide = LlmBatches(read_data_settings(mixed(rows=4)), words)
    wide.restore([saved(first)])
    for step in range(5):
        assert same(wide.at(step), joined(expected[10 + 4 * step:14 + 4 * step]))


@pytest.mark.process
def test_any_step_can_be_reached(mixed: Callable, words, no_workers_left: None) -> None:
    for packing in (True, False):
        settings = read_data_settings(mixed(packing=packing))
        whole = LlmBatches(settings, words)
        expected = [whole.at(step) for step in range(60)]
        with LlmBatches(settings, words, workers=1) as batches:
            for step in (55, 56, 3, 4, 59):
                assert same(batches.at(step), expected[step])
        alone = LlmBatches(settings, words)
        for step in (50, 2, 51, 0):
            assert same(alone.at(step), expected[step])
    with pytest.raises(ConfigError, match="no step -1"):
        alone.at(-1)


def test_states_that_do_not_fit(mixed: Callable, words) -> None:
    pair = [LlmBatches(read_data_settings(mixed()), words, rank=rank, world=2) for rank in range(2)]
    for batches in pair:
        batches.at(0)
    states = [saved(batches) for batches in pair]
    fresh = LlmBatches(read_data_settings(mixed()), words)
    with pytest.raises(ConfigError, match=r"needs those of 2 ranks, not of \[0\]"):
        fresh.restore(states[:1])
    with pytest.raises(ConfigError, match="needs those of all ranks"):
        fresh.restore([])
    pair[1].at(1)
    with pytest.raises(ConfigError, match="different steps"):
        fresh.restore([states[0], saved(pair[1])])
    for change in ({"seed": 7}, {"length": 256}, {"packing": False}):
        with pytest.raises(ConfigError, match=f"saved with {next(iter(change))} "):
            LlmBatches(read_data_settings(mixed(**change)), words).restore(states)
    with pytest.raises(ConfigError, match="saved with 48 lanes, and the settings ask for 7"):
        LlmBatches(read_data_settings(mixed(lanes=7)), words).restore(states)
    lost = json.loads(json.dumps(states))
    lost[1]["states"].clear()
    with pytest.raises(ConfigError, match="do not hold lane 1"):
        fresh.restore(lost)
    config = mixed()
    config["sources"].pop()
    with pytest.raises(ConfigError, match=r"saved with source 'texts' as \{.*, and now it is 'absent'"):
        LlmBatches(read_data_settings(config), words).restore(states)
    config = mixed()
    config["sources"][0]["weight"] = 9  # the mixture may change on the way
    LlmBatches(read_data_settings(config), words).restore(states)


def test_states_are_small(mixed: Callable, words) -> None:
    batches = LlmBatches(read_data_settings(mixed(length=2048)), words)
    for step in range(60):
        batches.at(step)
    assert len(json.dumps(batches.state())) < 64_000


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": -1}, {"workers": -1}])
def test_ranks_that_make_no_sense(mixed: Callable, words, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rank must be below world"):
        LlmBatches(read_data_settings(mixed()), words, **settings)


# ---- processes that die


@pytest.mark.process
def test_a_killed_worker_is_told_in_one_sentence(mixed: Callable, words, no_workers_left: None) -> None:
    settings = read_data_settings(mixed())
    with LlmBatches(settings, words, workers=2) as batches:
        first = batches.at(0)
        victim = batches.worker_pids()[1]
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(DataError, match=rf"data worker process \(pid {victim}\) was killed by signal 9") as error:
            for step in range(1, 40):  # what was loaded ahead still comes
                batches.at(step)
        assert "\n" not in str(error.value) and batches.worker_pids() == []
        assert same(batches.at(0), first)  # new workers start


class Exits:
    def __call__(self, job: int) -> int:
        if job == 3:
            os._exit(7)
        return job


def same_number(step: int) -> int:
    return step


@pytest.mark.process
def test_a_worker_that_ends_by_itself_is_told(no_workers_left: None) -> None:
    loader = StepLoader(Exits(), same_number, workers=1)
    with pytest.raises(DataError, match="ended with exit code 7"):
        [loader.at(step) for step in range(5)]


@pytest.mark.process
def test_steps_of_the_same_number_meet_the_same_worker(no_workers_left: None) -> None:
    loader = StepLoader(lambda job: (job, os.getpid()), same_number, workers=2, worker_of=lambda step: step % 3)
    found = [loader.at(step) for step in range(12)]
    assert [job for job, _ in found] == list(range(12))
    assert len({process for _, process in found}) == 2
    assert all(len({process for job, process in found if job % 3 == phase}) == 1 for phase in range(3))
    loader.close()
    with pytest.raises(ConfigError, match="-1 data workers"):
        StepLoader(Exits(), same_number, workers=-1)


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
        print(*batches.worker_pids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_after_sigkill_a_run_goes_on_to_the_sample(mixed: Callable, words, tmp_path: Path,
                                                   still_running: Callable) -> None:
    """A real process with workers, killed five steps after its state was saved; its workers end by themselves."""
    import hashlib

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
def test_a_program_that_fails_with_workers_at_work_ends(still_running: Callable) -> None:
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


def test_a_source_that_grew_is_named_alone(tmp_path: Path, words, lines: Callable) -> None:
    config = {"length": 64, "sources": [
        {"name": name, "files": str(lines(tmp_path / f"{name}.jsonl", [{"text": "some words"}] * 3)),
         "decoder": "pretrain.text"} for name in ("a", "b")]}
    batches = LlmBatches(read_data_settings(config), words)
    batches.at(0)
    lines(tmp_path / "b.jsonl", [{"text": "some words"}] * 4)
    with pytest.raises(ConfigError, match="saved with source 'b' as .*'records': 3.* now .*'records': 4") as error:
        LlmBatches(read_data_settings(config), words).restore([saved(batches)])
    assert "'a'" not in str(error.value)


@pytest.mark.parametrize(("packing", "change", "sentence"), [
    (True, {"sources": "turned round"}, r"sources in the order \['captions', 'documents', 'texts'\], and now it is "
                                        r"\['texts', 'documents', 'captions'\]"),
    (False, {"sources": "turned round"}, r"sources in the order"),
    (True, {"shuffle_block": 10}, "shuffle_block 10000, and now it is 10;"),
    (False, {"rows": 2}, "rows of micro-batches {'captions': 1, .*, and now it is {'captions': 2, ")])
def test_what_would_silently_be_other_data_is_refused(mixed: Callable, words, packing: bool, change: dict[str, Any],
                                                      sentence: str) -> None:
    """Counts belong to sources by their number, and positions to an order and to a number of rows."""
    config = mixed(packing=packing)
    batches = LlmBatches(read_data_settings(config), words)
    batches.at(0)
    state = saved(batches)
    other = config | change
    if isinstance(other["sources"], str):
        other["sources"] = config["sources"][::-1]
    with pytest.raises(ConfigError, match=sentence):
        LlmBatches(read_data_settings(other), words).restore([state])
    again = LlmBatches(read_data_settings(config), words)
    again.restore([state])
    assert same(again.at(1), batches.at(1))


class DiesAtStart:
    def enter_worker(self) -> None:
        os._exit(5)

    def __call__(self, job: int) -> int:
        return job


@pytest.mark.process
def test_a_worker_that_dies_while_it_starts_is_told(no_workers_left: None) -> None:
    loader = StepLoader(DiesAtStart(), same_number, workers=2)
    with pytest.raises(DataError, match="ended while it was starting") as error:
        loader.at(0)
    assert "\n" not in str(error.value) and loader.worker_pids() == []
