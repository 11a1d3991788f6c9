"""Padded micro-batches: one source each, fixed lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seed_multimodal.data.decoders.sequence import pad
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.mixture import Mixture

SIZES = {"captions": (48, 6), "documents": (80, 3), "texts": (70, 5)}  # max_length, batch_size


@pytest.fixture
def padded(mixed: Callable) -> Callable[..., dict[str, Any]]:
    def make(**settings: Any) -> dict[str, Any]:
        config = mixed(packing=False, **settings)
        for source in config["sources"]:
            source["max_length"], source["batch_size"] = SIZES[source["name"]]
        return config

    return make


def test_at_padded_is_the_original_form(padded: Callable, words, numbers: Callable) -> None:
    """Rows equal the released form of the sequences at the batch's positions, cut where they are too long."""
    settings = read_data_settings(padded())
    batches, mixture = LlmBatches(settings, words), Mixture(settings, words)
    drawn = Counter()
    for step in range(25):
        batch = batches.at(step)
        kind = numbers(batch)[0] // 1000
        length, size = list(SIZES.values())[kind]
        assert batch.input_ids.shape == (size, length) and {n // 1000 for n in numbers(batch)} == {kind}
        expected = [pad(mixture.sequence(kind, position, length)[0], length, 0)
                    for position in range(drawn[kind] * size, (drawn[kind] + 1) * size)]
        for name in ("input_ids", "labels", "attention_mask"):
            assert getattr(batch, name).tolist() == [row[name] for row in expected]
        assert batch.position_ids.tolist() == [list(range(length))] * size
        assert batch.tokens == int(batch.attention_mask.sum()) and batch.sequences == size
        drawn[kind] += 1
    assert set(drawn) == {0, 1, 2} and drawn[0] > drawn[1]
    assert 0 < batches.report()["fill"] < 0.95
    cut = batches.report()["sources"]["documents"]["too_long"]["cut"]
    assert cut["count"] > 3 and "tokens, rows have 80)" in cut["first"][0]


def test_at_packed_and_padded_targets(mixed: Callable, words, sequences: Callable) -> None:
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


def test_padded_shape_without_a_batch_size(mixed: Callable, words) -> None:
    config = mixed(packing=False, rows=2)
    for source in config["sources"]:
        source["max_length"] = 50
    assert LlmBatches(read_data_settings(config), words).at(0).input_ids.shape == (7, 50)  # 2 x 192 // 50


def test_at_padded_with_broken_samples(tmp_path: Path, words, codes: Callable, lines: Callable,
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
    found = [batches.at(step) for step in range(10)]  # a batch of which nothing is left is passed over
    assert all(batch.sequences == 1 for batch in found)
    assert {n for batch in found for n in numbers(batch)} == {n for n in range(12) if n not in (3, 7)}


