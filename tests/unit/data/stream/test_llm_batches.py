"""`LlmBatches`: equal for any number of workers and after a kill.

No sample lost with another number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from data_files import lines
from real_processes import run_process
from repository import ROOT
from warm_python import PYTHON

from seed_multimodal.data.stream.config import read_data_settings, read_once
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.vocabulary import IGNORE_INDEX

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores
SIZES = {
    "captions": (48, 6),
    "documents": (80, 3),
    "texts": (70, 5),
}  # max_length, batch_size of padded micro-batches
COUNTS = ("tokens", "learned", "sequences", "squares")


def same(left: LlmBatch, right: LlmBatch) -> bool:
    masks = (left.attention_mask, right.attention_mask)
    return (
        all(
            torch.equal(getattr(left, name), getattr(right, name))
            for name in ("input_ids", "labels", "position_ids")
        )
        and (masks[0] is masks[1] is None or torch.equal(*masks))
        and all(getattr(left, name) == getattr(right, name) for name in COUNTS)
    )


def saved(batches: LlmBatches) -> dict[str, Any]:
    return json.loads(json.dumps(batches.state()))


@pytest.fixture
def config(mixed: Callable) -> Callable[..., dict[str, Any]]:
    """`config(packing, cycles=(…), **settings)`: the three sets, padded in micro-batches of their
    own sizes.
    """

    def make(packing: bool = True, cycles: tuple[int, ...] = (), **settings: Any) -> dict[str, Any]:
        groups = mixed(packing=packing, **settings)
        for source in groups["sources"]:
            source["max_length"], source["batch_size"] = SIZES[source["name"]]
        for source, count in zip(groups["sources"], cycles, strict=False):
            source["cycles"] = count
        return groups

    return make


def test_next_packed(mixed, tokenizer, sequences, record_numbers):
    batches = LlmBatches(read_data_settings(mixed(rows=3)), tokenizer)
    tokens = positions = 0
    for batch in itertools.islice(batches, 12):
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 192)
        assert {tensor.dtype for tensor in (batch.input_ids, batch.labels, batch.position_ids)} == {
            torch.int64
        }
        assert batch.attention_mask is None
        pairs = sequences(batch)
        assert len(pairs) == batch.sequences == len(record_numbers(batch))
        assert sum(len(ids) for ids, _ in pairs) == batch.tokens
        assert sum(len(ids) ** 2 for ids, _ in pairs) == batch.squares
        assert int((batch.labels[:, 1:] != -100).sum()) == batch.learned
        for ids, labels in pairs:
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert (
                labels[0] == -100 and labels[1:] == ids[1:]
            )  # labels of pre-training are the whole sequence
        tokens = tokens + batch.tokens
        positions = positions + batch.input_ids.numel()
    report = batches.report()
    assert (report["tokens"], report["positions"]) == (
        tokens,
        positions,
    ) and tokens > 0.9 * positions
    assert batches.wait_seconds > 0 and same(batch.to("cpu"), batch)


def test_next_padded_is_the_original_form(config, tokenizer, record_numbers):
    """Rows are padded or cut sequences, as in the original."""
    settings = read_data_settings(config(packing=False))
    batches = LlmBatches(settings, tokenizer)
    mixture = Mixture(settings, tokenizer)
    n_chunks = Counter()
    for batch in itertools.islice(batches, 25):
        kind = record_numbers(batch)[0] // 1000
        length, size = list(SIZES.values())[kind]
        assert batch.input_ids.shape == (size, length) and {
            n // 1000 for n in record_numbers(batch)
        } == {kind}
        expected = [
            mixture.sources[kind].sequence(position, length)[0]
            for position in range(n_chunks[kind] * size, (n_chunks[kind] + 1) * size)
        ]
        for name, values, filler in (
            ("input_ids", [one.ids for one in expected], 0),
            ("labels", [one.labels for one in expected], IGNORE_INDEX),
            ("attention_mask", [[1] * len(one) for one in expected], 0),
        ):
            assert getattr(batch, name).tolist() == [
                row + [filler] * (length - len(row)) for row in values
            ]
        assert batch.position_ids.tolist() == [list(range(length))] * size
        assert batch.tokens == int(batch.attention_mask.sum()) and batch.sequences == size
        n_chunks[kind] += 1
    assert set(n_chunks) == {0, 1, 2} and n_chunks[0] > n_chunks[1]
    cut = batches.report()["sources"]["documents"]["skipped"]["too long, cut"]
    assert cut["count"] > 3 and "tokens, rows have 80)" in cut["first"][0]


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
def test_restore(config, tokenizer, packing, no_workers_left: None):
    settings = read_data_settings(config(packing, rows=2))
    uninterrupted = LlmBatches(settings, tokenizer)
    expected = list(itertools.islice(uninterrupted, 70))
    for workers, stop in ((0, 7), (1, 0), (3, 61)):
        with LlmBatches(settings, tokenizer, workers=workers) as first:
            generator = torch.random.get_rng_state()
            assert all(map(same, expected[:stop], itertools.islice(first, stop)))
            assert torch.equal(torch.random.get_rng_state(), generator)
            state = saved(first)
        with LlmBatches(settings, tokenizer, workers=workers) as second:
            second.restore([state])
            assert saved(second) == state
            assert all(map(same, expected[stop : stop + 9], second))
    assert second.report() == uninterrupted.report() and saved(second) == saved(uninterrupted)
    assert len(json.dumps({**state, "sources": []})) < 3000


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 2)])
def test_restore_in_another_number_of_processes(
    config, tokenizer, record_numbers, packing, before, after
):
    """Over two changes of the number of processes every record is used as often as its cycles."""
    settings = read_data_settings(config(packing, (2, 3, 1), too_long="truncate"))
    reads = Counter[int]()
    states = list[dict[str, Any]]()
    for world, steps in ((before, 5), (after, 4), (before, 1000)):
        ranks = [LlmBatches(settings, tokenizer, rank=rank, world=world) for rank in range(world)]
        for batches in ranks:
            if states:
                batches.restore(states[::-1])
            for batch in itertools.islice(batches, steps + batches.rank):  # ranks may differ
                reads.update(record_numbers(batch))
        states = [saved(batches) for batches in ranks]
    assert reads == {
        **dict.fromkeys(range(66), 2),
        **dict.fromkeys(range(1000, 1030), 3),
        **dict.fromkeys(range(2000, 2035), 1),
    }
    assert sum(one["sequences"] for state in states for one in state["sources"]) == reads.total()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", [True, False])
def test_restore_in_many_numbers_of_processes(tmp_path, tokenizer, record_numbers, seed, packing):
    """Ranks read runs of neighbours; every record is used as often as its cycles."""
    rng = random.Random(seed)
    for part in range(3):
        lines(
            tmp_path / f"{part}.jsonl",
            [{"text": f"number {n}"} for n in range(part * 150, part * 150 + 150)],
        )
    source = {
        "name": "t",
        "files": str(tmp_path),
        "decoder": "pretrain.text",
        "cycles": 3,
        "batch_size": 2,
    }
    settings = read_data_settings({"sources": [source], "length": 24, "packing": packing})
    reads = Counter[int]()
    states = list[dict[str, Any]]()
    for steps in (
        rng.randint(0, 12),
        rng.randint(0, 12),
        rng.randint(0, 12),
        rng.randint(0, 12),
        1000,
    ):
        world = rng.randint(1, 5)
        ranks = [LlmBatches(settings, tokenizer, rank=rank, world=world) for rank in range(world)]
        assert world == 1 or ranks[0].order.cursors[0].runs.length > 5
        for batches in ranks:
            if states:
                batches.restore(states)
            for batch in itertools.islice(batches, steps + rng.randint(0, 5)):
                reads.update(record_numbers(batch))
        states = [saved(batches) for batches in ranks]
    assert reads == dict.fromkeys(range(450), 3)


def test_following_gives_ranks_neighbouring_positions(
    tmp_path,
    tokenizer,
):
    for part in range(4):
        lines(tmp_path / f"{part}.jsonl", [{"text": f"number {n}"} for n in range(100)])
    source = {"name": "t", "files": str(tmp_path), "decoder": "pretrain.text", "cycles": 1}
    settings = read_data_settings({"sources": [source], "length": 24})
    draws = [
        [
            chunk.start
            for chunk in LlmBatches(settings, tokenizer, rank=rank, world=4).order.following()
        ]
        for rank in range(4)
    ]
    assert sorted(start for ranked in draws for start in ranked) == list(range(400))
    assert [ranked[:26] for ranked in draws] == [
        [*range(25 * rank, 25 * rank + 25), 100 + 25 * rank] for rank in range(4)
    ]


def test_restore_near_the_end(mixed, tokenizer, record_numbers):
    config = mixed(length=96)
    config["sources"] = [{**config["sources"][2], "cycles": 2}]
    uninterrupted = list(map(record_numbers, LlmBatches(read_data_settings(config), tokenizer)))
    for stop in range(len(uninterrupted) - 5, len(uninterrupted) + 1):
        first, second = (LlmBatches(read_data_settings(config), tokenizer) for _ in range(2))
        assert [record_numbers(batch) for batch in itertools.islice(first, stop)] == uninterrupted[
            :stop
        ]
        second.restore([saved(first)])
        assert (
            list(map(record_numbers, second)) == uninterrupted[stop:] and next(second, None) is None
        )
        assert second.report()["sources"]["texts"]["draws"] == 2 * 35


def test_restore_with_other_data(mixed, tokenizer):
    pair = [
        LlmBatches(read_data_settings(mixed()), tokenizer, rank=rank, world=2) for rank in range(2)
    ]
    states = [saved(batches) for batches in pair]
    with pytest.raises(ConfigError, match="has 1 ranks, but 2 were saved"):
        pair[0].restore(states[:1])
    for change, message in (
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"length": 256}, "length: 192 -> 256"),
        ({"sources": mixed()["sources"][::-1]}, "source texts.number: 2 -> 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LlmBatches(read_data_settings({**mixed(), **change}), tokenizer).restore(states)
    config = mixed()
    config["sources"][0]["weight"] = 9  # weights may change during a run
    LlmBatches(read_data_settings(config), tokenizer).restore(states)


SCRIPT = """
import hashlib, json, multiprocessing, os, signal, sys
from pathlib import Path
from seed_multimodal.data.stream.config import read_data_settings, read_once
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.language.tokenizer import MultimodalTokenizer

words = MultimodalTokenizer.from_pretrained(sys.argv[1])
batches = LlmBatches(read_data_settings(json.loads(sys.argv[2])), words, workers=2)
for step, batch in zip(range(18), batches):
    print(step, hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest(), flush=True)
    if step == 12:
        Path(sys.argv[3]).write_text(json.dumps(batches.state()))
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_restore_after_sigkill(mixed, tokenizer, tmp_path, still_running):
    """A process with workers is killed five steps after its state was saved; its workers end."""
    root = ROOT
    config = mixed(rows=2)
    state = tmp_path / "state.json"
    killed = run_process(
        [
            PYTHON,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            str(root / "pretrained/nano/seed_tokenizer"),
            json.dumps(config),
            str(state),
        ],
        timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    *lines, workers = killed.stdout.splitlines()
    uninterrupted, fresh = (LlmBatches(read_data_settings(config), tokenizer) for _ in range(2))
    fresh.restore([json.loads(state.read_text())])
    for step, batch in zip(range(18), uninterrupted, strict=False):
        assert (
            lines[step] == f"{step} {hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest()}"
        )
        assert step <= 12 or same(next(fresh), batch)
    assert still_running(workers.split()) == []


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_data_is_read_once(mixed, tokenizer, record_numbers, packing):
    """By any number of processes, whatever the cycles of its sources."""
    settings = read_once(read_data_settings(mixed(packing=packing)))
    once = 0
    for world in (1, 2, 3):
        reads = Counter[int]()
        learned = 0
        for rank in range(world):
            for batch in LlmBatches(settings, tokenizer, rank=rank, world=world):
                reads.update(record_numbers(batch))
                learned += batch.learned
        assert reads == dict.fromkeys([*range(66), *range(1000, 1030), *range(2000, 2035)], 1)
        once = once or learned
        assert learned == once > 0
