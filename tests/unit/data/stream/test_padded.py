"""The released padded micro-batches: one source each, fixed lengths, the same for any ranks and starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_multimodal.data.decoders.base import IGNORED
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData, Mixture
from seed_multimodal.errors import DataError

SIZES = {"captions": (48, 6), "documents": (80, 3), "texts": (70, 5)}  # max_length, batch_size


@pytest.fixture
def padded(mixed: Callable) -> Callable[..., dict[str, Any]]:
    def make(**settings: Any) -> dict[str, Any]:
        config = mixed(packing=False, **settings)
        for source in config["sources"]:
            source["max_length"], source["batch_size"] = SIZES[source["name"]]
        return config

    return make


def test_batches_are_of_one_source_in_its_fixed_form(padded: Callable, words, numbers: Callable) -> None:
    """Rows equal the released form of the sequences at the batch's positions, cut where they are too long."""
    settings = read_data_settings(padded())
    batches, mixture = LlmBatches(settings, words), Mixture(settings, words)
    drawn = Counter()
    for step in range(25):
        batch = batches.at(step)
        kind = numbers(batch)[0] // 1000
        length, size = list(SIZES.values())[kind]
        assert batch.input_ids.shape == (size, length) and {n // 1000 for n in numbers(batch)} == {kind}
        expected = [mixture.sequence(kind, position, length)[0]
                    for position in range(drawn[kind] * size, (drawn[kind] + 1) * size)]
        for name, values, filler in (("input_ids", [one.ids for one in expected], 0),
                                     ("labels", [one.labels for one in expected], IGNORED),
                                     ("attention_mask", [[1] * len(one) for one in expected], 0)):
            assert getattr(batch, name).tolist() == [row + [filler] * (length - len(row)) for row in values]
        assert batch.position_ids.tolist() == [list(range(length))] * size
        assert batch.tokens == int(batch.attention_mask.sum()) and batch.sequences == size
        drawn[kind] += 1
    assert set(drawn) == {0, 1, 2} and drawn[0] > drawn[1]
    assert 0 < batches.statistics.fill < 0.95
    cut = batches.report()["sources"]["documents"]["too_long"]["cut"]
    assert cut["count"] > 3 and "tokens, rows have 80)" in cut["first"][0]


def test_packed_and_padded_sequences_have_the_same_targets(mixed: Callable, words, sequences: Callable) -> None:
    """Padded rows keep the released label of `<s>`, which is nobody's target; after the shift nothing differs."""
    targets: list[dict[tuple[int, ...], list[int]]] = []
    for packing in (True, False):
        batches = LlmBatches(read_data_settings(mixed(packing=packing)), words)
        found = {tuple(ids): labels for step in range(30) for ids, labels in sequences(batches.at(step))}
        targets.append(found)
    shared = set(targets[0]) & set(targets[1])
    assert len(shared) > 20
    for ids in shared:
        packed, padded = targets[0][ids], targets[1][ids]
        assert packed[1:] == padded[1:] and packed[0] == -100 and padded[0] == words.bos_id


def test_ranks_share_the_run_of_one(padded: Callable, words) -> None:
    settings = read_data_settings(padded())
    single = LlmBatches(settings, words)
    micro = [single.at(step).input_ids for step in range(18)]
    for world in (2, 3):
        ranks = [LlmBatches(settings, words, rank=rank, world=world) for rank in range(world)]
        found = [batches.at(step).input_ids for step in range(18 // world) for batches in ranks]
        assert all(torch.equal(*pair) for pair in zip(found, micro, strict=True))


def test_every_sample_once_per_epoch(padded: Callable, words, numbers: Callable) -> None:
    """To the end of all cycles; a source's last batch is smaller, as released."""
    config = padded()
    for source, cycles in zip(config["sources"], (2, 1, 3), strict=True):
        source["cycles"] = cycles
    batches = LlmBatches(read_data_settings(config), words)
    seen: Counter[int] = Counter()
    sizes = []
    with pytest.raises(EndOfData):
        for step in range(200):
            batch = batches.at(step)
            sizes.append(batch.sequences)
            seen.update(numbers(batch))
    assert seen == {**dict.fromkeys(range(66), 2), **dict.fromkeys(range(1000, 1030), 1),
                    **dict.fromkeys(range(2000, 2035), 3)}
    assert len(sizes) == 22 + 10 + 21 and sorted(set(sizes)) == [3, 5, 6]


def test_sources_that_end_leave_their_share_to_the_others(padded: Callable, words, numbers: Callable) -> None:
    config = padded()
    config["sources"][0]["cycles"] = 1  # eleven batches
    batches = LlmBatches(read_data_settings(config), words)
    drawn = Counter(numbers(batches.at(step))[0] // 1000 for step in range(160))
    assert drawn[0] == 11 and drawn[2] / drawn[1] == pytest.approx(2, rel=0.4)


def test_without_a_batch_size_a_micro_batch_holds_as_many_positions_as_packed_rows(mixed: Callable, words) -> None:
    config = mixed(packing=False, rows=2)
    for source in config["sources"]:
        source["max_length"] = 50
    assert LlmBatches(read_data_settings(config), words).at(0).input_ids.shape == (7, 50)  # 2 x 192 // 50


def test_a_broken_sample_makes_its_batch_smaller(tmp_path: Path, words, codes: Callable, lines: Callable,
                                                 numbers: Callable) -> None:
    records = [{"image_ids": codes(n), "text": f"number {n}" if n != 3 else "...", "metadata": {}} for n in range(12)]
    records[7]["image_ids"] = [1]
    lines(tmp_path / "c.jsonl", records)
    config = {"sources": [{"name": "c", "files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption", "cycles": 1,
                           "batch_size": 4, "max_length": 48}], "packing": False, "length": 48}
    batches = LlmBatches(read_data_settings(config), words)
    found = [batches.at(step) for step in range(3)]
    assert sum(batch.sequences for batch in found) == 10
    assert sorted(n for batch in found for n in numbers(batch)) == [n for n in range(12) if n not in (3, 7)]
    single = {**config, "sources": [{**config["sources"][0], "batch_size": 1}]}
    batches = LlmBatches(read_data_settings(single), words)
    found = [batches.at(step) for step in range(12)]  # a batch of which nothing is left takes the next sample instead
    assert all(batch.sequences == 1 for batch in found)
    assert {n for batch in found for n in numbers(batch)} == {n for n in range(12) if n not in (3, 7)}


def test_nothing_but_broken_samples_ends_the_run(tmp_path: Path, words, lines: Callable) -> None:
    lines(tmp_path / "c.jsonl", ["{"] * 6)
    config = {"sources": [{"name": "c", "files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption", "cycles": 1,
                           "batch_size": 4}], "packing": False, "length": 40}
    with pytest.raises(DataError, match=r"Source c: no record can be used \(6 records tried\); .*c\.jsonl: line \d"):
        LlmBatches(read_data_settings(config), words).at(0)
