"""Which source a draw takes, and which sequence: weights, epochs, cycles, what is passed over, what ends a run."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData, Mixture, SourceChoice, uniform
from seed_multimodal.data.stream.skip_budget import SkipBudget, SkippedSample
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def test_numbers_are_drawn_evenly_and_only_by_their_arguments() -> None:
    drawn = np.array([uniform(3, lane, draw) for lane in range(50) for draw in range(200)])
    assert 0 <= drawn.min() and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.01
    assert np.histogram(drawn, 10)[0].min() > 900 and len(set(drawn.tolist())) == len(drawn)
    assert uniform(3, 0, 1) == uniform(3, 0, 1) != uniform(4, 0, 1) and uniform(3, 0, 1) != uniform(3, 1, 0)


def test_choices_follow_the_weights_among_what_is_left() -> None:
    choice = SourceChoice([0.5, 0.3, 0.2], "sample", seed=1)
    drawn = Counter(choice([0, 0, 0], [True] * 3, draw) for draw in range(20_000))
    assert [round(drawn[source] / 20_000, 2) for source in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.011)
    left = Counter(choice([0, 0, 0], [False, True, True], draw) for draw in range(20_000))
    assert left[0] == 0 and left[1] / 20_000 == pytest.approx(0.6, abs=0.011)
    assert choice([0, 0, 0], [False] * 3, 5) is None


@pytest.mark.parametrize(("kind", "expected"), [("concat", [0, 0, 0, 1, 2, 2, None]),
                                                ("mux_longest", [0, 1, 2, 0, 2, 0, None])])
def test_other_ways_to_put_sources_together(kind: str, expected: list[int | None]) -> None:
    choice, counts, limits, drawn = SourceChoice([1, 1, 1], kind, seed=0), [0, 0, 0], [3, 1, 2], []
    for draw in range(7):
        source = choice(counts, [count < limit for count, limit in zip(counts, limits, strict=True)], draw)
        drawn.append(source)
        if source is not None:
            counts[source] += 1
    assert drawn == expected


def test_every_epoch_of_a_source_has_each_record_once(mixed: Callable, words) -> None:
    mixture = Mixture(read_data_settings(mixed()), words)
    assert mixture.sizes == [66, 30, 35]
    epochs = [[mixture.index(0, epoch * 66 + place) for place in range(66)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(66)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert [mixture.index(0, place) for place in (70, 3, 131)] == [epochs[1][4], epochs[0][3], epochs[1][65]]
    other = Mixture(read_data_settings(mixed(seed=1)), words)
    assert [other.index(0, place) for place in range(66)] != epochs[0]


def test_a_sequence_is_a_function_of_seed_source_and_position(mixed: Callable, words) -> None:
    one, two = (Mixture(read_data_settings(mixed()), words) for _ in range(2))
    places = [(source, position) for source in range(3) for position in (0, 5, 40, 71)]
    first = [one.sequence(*place)[0].ids for place in places]
    assert [two.sequence(*place)[0].ids for place in reversed(places)] == first[::-1]
    views = {tuple(one.sequence(0, epoch * 66 + _place_of(one, epoch, 7))[0].ids) for epoch in range(12)}
    assert len(views) == 2  # image first or last, drawn anew in each epoch


def _place_of(mixture: Mixture, epoch: int, record: int) -> int:
    return next(place for place in range(66) if mixture.index(0, epoch * 66 + place) == record)


@pytest.mark.parametrize("sized", [False, True])
def test_proportions_follow_the_weights(mixed: Callable, words, sized: bool) -> None:
    """Weights 4 : 1 : 2; with batch sizes they count micro-batches, so sequences are weight x batch_size."""
    config = mixed()
    if sized:
        for source, size in zip(config["sources"], (1, 8, 2), strict=True):
            source["batch_size"] = size
    batches = LlmBatches(read_data_settings(config), words)
    for step in range(300):
        batches.at(step)
    drawn = np.array([one["sequences"] for one in batches.report()["sources"].values()])
    expected = np.array([4, 8, 4]) / 16 if sized else np.array([4, 1, 2]) / 7
    assert drawn.sum() > 800 and drawn / drawn.sum() == pytest.approx(expected, abs=0.04)


@pytest.mark.process
@pytest.mark.parametrize(("world", "rows", "lanes", "workers"), [
    (1, 1, 5, 0), (1, 1, None, 0), (1, 2, 6, 2), (2, 1, 6, 0), (3, 2, None, 0)])
def test_every_sample_once_per_epoch_over_all_lanes(mixed: Callable, words, numbers: Callable, world: int, rows: int,
                                                    lanes: int | None, workers: int) -> None:
    """All cycles of all sources, up to the first refusal: each record exactly as often as its cycles say, though lanes
    end at different rows."""
    config = mixed(lanes=lanes, rows=rows)
    for source, cycles in zip(config["sources"], (2, 3, 1), strict=True):
        source["cycles"] = cycles
    seen: Counter[int] = Counter()
    draws: Counter[str] = Counter()
    for rank in range(world):
        with LlmBatches(read_data_settings(config), words, rank=rank, world=world, workers=workers) as batches:
            for step in itertools.count():
                try:
                    batch = batches.at(step)
                except EndOfData:
                    break
                seen.update(numbers(batch))
                assert batch.sequences or world > 1  # ranks stay together by empty batches; one alone needs none
            draws.update({name: one["draws"] for name, one in batches.report()["sources"].items()})
    assert seen == {**dict.fromkeys(range(66), 2), **dict.fromkeys(range(1000, 1030), 3),
                    **dict.fromkeys(range(2000, 2035), 1)}
    assert draws == {"captions": 132, "documents": 90, "texts": 35}


@pytest.mark.parametrize("packing", [True, False])
def test_near_the_end_a_run_goes_on_too(mixed: Callable, words, numbers: Callable, packing: bool) -> None:
    """Streams have ended and their empty micro-batches were left out; the state still says what is next."""
    config = mixed(length=96, packing=packing)
    config["sources"] = [{**config["sources"][2], "cycles": 7}]

    def rest(batches: LlmBatches, first: int) -> list[list[int]]:
        found = []
        for step in itertools.count(first):
            try:
                found.append(numbers(batches.at(step)))
            except EndOfData:
                return found
        raise AssertionError

    whole = rest(LlmBatches(read_data_settings(config), words), 0)
    for stop in range(len(whole) - 12, len(whole) + 1):
        first, second = (LlmBatches(read_data_settings(config), words) for _ in range(2))
        assert [numbers(first.at(step)) for step in range(stop)] == whole[:stop]
        second.restore([json.loads(json.dumps(first.state()))])
        assert rest(second, stop) == whole[stop:]
        assert second.report()["sources"]["texts"]["draws"] == 7 * 35


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_that_end_at_different_steps_go_on_in_another_number(mixed: Callable, words, numbers: Callable,
                                                                   packing: bool) -> None:
    """States saved when one rank has nothing left: the rest is read by three ranks, each record once."""
    config = mixed(length=96, packing=packing)
    config["sources"] = [{**config["sources"][2], "cycles": 1}]
    settings, seen = read_data_settings(config), Counter()

    def read(batches: LlmBatches, step: int) -> bool:
        try:
            seen.update(numbers(batches.at(step)))
        except EndOfData:
            return False
        return True

    first = [LlmBatches(settings, words, rank=rank, world=2) for rank in range(2)]
    steps = next(step for step in itertools.count() if sum(read(batches, step) for batches in first) < 2) + 1
    states = json.loads(json.dumps([batches.state(steps) for batches in first]))
    for rank in range(3):
        batches = LlmBatches(settings, words, rank=rank, world=3)
        batches.restore(states)
        for step in itertools.count(steps):
            if not read(batches, step):
                break
    assert seen == dict.fromkeys(range(2000, 2035), 1)


def test_a_source_that_ends_leaves_its_share_to_the_others(mixed: Callable, words) -> None:
    config = mixed(lanes=1)
    config["sources"][0]["cycles"] = 1
    batches = LlmBatches(read_data_settings(config), words)
    for step in range(250):
        batches.at(step)
    drawn = {name: one["sequences"] for name, one in batches.report()["sources"].items()}
    assert drawn["captions"] == 66 and drawn["texts"] / drawn["documents"] == pytest.approx(2, rel=0.35)


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_end_of_all_data_is_one_sentence(mixed: Callable, words, packing: bool, workers: int) -> None:
    config = mixed(packing=packing)
    config["sources"] = [{**config["sources"][0], "cycles": 1}]
    with LlmBatches(read_data_settings(config), words, workers=workers) as batches, \
            pytest.raises(DataError, match=r"All sources are used up \(cycles: captions 1x\).*raise cycles") as error:
        for step in range(200):
            batches.at(step)
    assert isinstance(error.value, EndOfData) and "\n" not in str(error.value)


def test_what_is_too_long_is_counted_and_named(tmp_path: Path, words, lines: Callable) -> None:
    lines(tmp_path / "t.jsonl", [{"text": f"number {n} " + "many words follow " * (40 if n == 3 else 1)}
                                 for n in range(8)])
    config = {"sources": [{"name": "t", "files": str(tmp_path / "t.jsonl"), "decoder": "pretrain.text", "cycles": 1}],
              "length": 40, "lanes": 1}
    reports = {}
    for kind in ("skip", "truncate", "split"):
        batches = LlmBatches(read_data_settings({**config, "too_long": kind}), words)
        with pytest.raises(EndOfData):
            for step in range(100):
                batches.at(step)
        reports[kind] = batches.report()["sources"]["t"]
    for kind, name in (("skip", "skipped"), ("truncate", "cut"), ("split", "split")):
        entry = reports[kind]["too_long"][name]
        assert entry["count"] == 1 and entry["first"][0].startswith(f"{tmp_path / 't.jsonl'}: line 4 (")
    assert [reports[kind]["sequences"] for kind in ("skip", "truncate")] == [7, 8]
    assert reports["split"]["sequences"] > 9
    assert [(one["draws"], one["epochs"]) for one in reports.values()] == [(8, 1)] * 3  # pieces are no draws
    assert reports["split"]["tokens"] > reports["truncate"]["tokens"] > reports["skip"]["tokens"]


def test_only_running_text_is_split(tmp_path: Path, mixed: Callable, words, codes: Callable, lines: Callable) -> None:
    lines(tmp_path / "c.jsonl", [{"image_ids": codes(n), "text": "many words " * (n % 2 * 50 + 1)} for n in range(9)])
    config = mixed(length=60, too_long="split")
    config["sources"][1] |= {"files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption"}
    batches = LlmBatches(read_data_settings(config), words)
    for step in range(40):
        batches.at(step)
    report = batches.report()["sources"]
    assert set(report["texts"]["too_long"]) == {"split"} and set(report["documents"]["too_long"]) == {"skipped"}


def test_records_left_out_by_their_decoder_are_counted(tmp_path: Path, words, codes: Callable, shard: Callable) -> None:
    shard(tmp_path / "c.tar", [{"image_ids": codes(n), "text": " ., " if n % 4 == 1 else f"number {n}",
                                "metadata": {}} for n in range(12)])
    config = {"sources": [{"name": "c", "files": str(tmp_path), "decoder": "pretrain.caption", "cycles": 1}],
              "length": 60, "lanes": 1}
    said: list[str] = []
    batches = LlmBatches(read_data_settings(config), words, log=said.append)
    with pytest.raises(EndOfData):
        for step in range(100):
            batches.at(step)
    (reason, entry), = batches.report()["sources"]["c"]["skipped"].items()
    assert entry["count"] == 3 and len(said) == 3 and all(reason in line for line in said)
    assert sorted(entry["first"]) == [f"{tmp_path / 'c.tar'}: sample {n:05d}" for n in (1, 5, 9)]


@pytest.mark.process
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_records_are_skipped_named_and_counted(tmp_path: Path, words, codes: Callable, lines: Callable,
                                                      numbers: Callable, packing: bool, workers: int) -> None:
    records: list[Any] = [{"image_ids": codes(n), "text": f"number {n}", "metadata": {}} for n in range(30)]
    records[4] = '{"image_ids": [1, 2'
    records[9]["image_ids"][0] = 10**6
    del records[17]["text"]
    lines(tmp_path / "c.jsonl", records)
    config = {"sources": [{"name": "c", "files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption", "cycles": 4,
                           "batch_size": 5, "max_length": 60}], "length": 120, "lanes": 2, "packing": packing}
    seen: Counter[int] = Counter()
    with LlmBatches(read_data_settings(config), words, workers=workers) as batches, pytest.raises(EndOfData):
        for step in range(200):
            seen.update(numbers(batches.at(step)))
    skipped = batches.report()["sources"]["c"]["skipped"]
    named = sorted(where for entry in skipped.values() for where in entry["first"])
    assert len(named) == 3 and all(f"{tmp_path / 'c.jsonl'}: line {n}:" in where for n, where in
                                   zip((10, 18, 5), named, strict=True))
    assert sum(entry["count"] for entry in skipped.values()) == 12 or packing  # a lane may end before the other
    assert set(seen) == set(range(30)) - {4, 9, 17} and max(seen.values()) <= 4


@pytest.mark.process
@pytest.mark.parametrize(("workers", "packing"), [(0, True), (1, True), (0, False)])
def test_stream_ends_at_broken_records_of_one_source_beside_a_good_one(tmp_path: Path, words, lines: Callable,
                                                                      workers: int, packing: bool) -> None:
    bad = [{"image_ids": [1, 2], "text": "x", "metadata": {}}] * 199
    lines(tmp_path / "c.jsonl", [{"image_ids": [1] * 32, "text": "x", "metadata": {}}, *bad])
    lines(tmp_path / "t.jsonl", [{"text": "words " * 9}] * 50)
    sources = [{"name": name, "files": str(tmp_path / f"{name}.jsonl"), "decoder": f"pretrain.{kind}", "batch_size": 8,
                "max_length": 60} for name, kind in (("c", "caption"), ("t", "text"))]
    config = {"sources": sources, "length": 60, "lanes": 1, "max_bad_in_a_row": 130, "packing": packing}
    sentence = r"130 records of source c are broken without a good one between them, the last: .*c\.jsonl: line \d+"
    with LlmBatches(read_data_settings(config), words, workers=workers) as batches, \
            pytest.raises(DataError, match=sentence):
        for step in range(2000):
            batches.at(step)


@pytest.mark.parametrize("packing", [True, False])
def test_check_usable_ends_the_run_at_its_start_beside_a_good_source(tmp_path: Path, words, lines: Callable,
                                                                    packing: bool) -> None:
    lines(tmp_path / "c.jsonl", [{"image": "a.jpg", "caption": "x"}] * 300)
    lines(tmp_path / "t.jsonl", [{"text": "words"}] * 50)
    config = {"sources": [{"name": "t", "files": str(tmp_path / "t.jsonl"), "decoder": "pretrain.text", "weight": 99},
                          {"name": "c", "files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption"}],
              "length": 60, "packing": packing}
    with pytest.raises(DataError, match=r"Source c: no record can be used \(100 records tried\); the first: .*: "
                       "image_ids: is missing; decoder pretrain.caption needs it"):
        LlmBatches(read_data_settings(config), words)


def test_a_search_without_hope_ends(tmp_path: Path, words, lines: Callable) -> None:
    budget = SkipBudget(3)
    assert not budget.spend() and not budget.spend("dropped") and not budget.spend()
    budget.good()
    assert [budget.spend("dropped") for _ in range(1000)] == [False] * 999 + [True]
    lines(tmp_path / "t.jsonl", [{"text": "many words " * 50}] * 3)
    config = {"sources": [{"name": "s", "files": str(tmp_path / "t.jsonl"), "decoder": "pretrain.text"}], "length": 20}
    with pytest.raises(DataError, match=r"no record can be used \(3 records tried.*tokens, rows have 20\): too long"):
        LlmBatches(read_data_settings(config), words)


def test_noise_comes_from_other_pictures_of_the_source(tmp_path: Path, words, shard: Callable) -> None:
    size = words.vocabulary.tokens_per_image
    shard(tmp_path / "c.tar", [{"image_ids": [n] * size, "text": f"number {n}", "metadata": {}} for n in range(20)])
    config = {"sources": [{"name": "c", "files": str(tmp_path), "decoder": "pretrain.caption",
                           "options": {"reverse_ratio": 1.0, "code_noise": 0.8}}], "length": 60}
    mixture = Mixture(read_data_settings(config), words)
    pictures = [mixture.sequence(0, position)[0].ids[2:2 + size] for position in range(20)]
    foreign = [len([code for code in codes if code != max(set(codes), key=codes.count)]) for codes in pictures]
    assert max(foreign) >= size // 4 and all(len(set(codes)) <= 2 for codes in pictures)
    assert pictures == [Mixture(read_data_settings(config), words).sequence(0, position)[0].ids[2:2 + size]
                        for position in range(20)]


@pytest.mark.parametrize(("change", "message"), [
    ({"lenght": 4}, "did you mean 'length'"),
    ({"too_long": "splitt"}, "did you mean 'split'"),
    ({"concat_type": "mux"}, "concat_type"),
    ({"length": 0}, "data: length must be at least 2, not 0"),
    ({"seed": -1}, "data: seed must be at least 0, not -1"),
    ({"packing": "maybe"}, "packing: input should be a valid boolean"),
    ({"sources": []}, "at least one source"),
    ({"buffer": 0}, "data: buffer must be above 0, not 0"),
    ({"buffer": 1e300}, "data: buffer must be at most 1000, not 1e"),  # would read for ever
])
def test_settings_that_make_no_sense(mixed: Callable, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_data_settings(mixed(**change))


@pytest.mark.parametrize(("change", "message"), [
    ({"wieght": 1}, "did you mean 'weight'"),
    ({"weight": 0}, r"sources\[0\] \(captions\): weight must be above 0, not 0"),
    ({"cycles": 0}, "cycles must be at least 1, not 0"),
    ({"decoder": None}, "decoder is needed"),
    ({"name": "texts"}, "two sources named 'texts'"),
    ({"batch_size": 4}, "'captions' has a batch_size and 'documents' has none"),
    ({"files": 3}, "files: str: input should be a valid string, not 3"),
])
def test_sources_that_make_no_sense(mixed: Callable, change: dict[str, Any], message: str) -> None:
    config = mixed()
    config["sources"][0].update(change)
    with pytest.raises(ConfigError, match=message):
        read_data_settings(config)


def test_a_wrong_decoder_is_told_with_its_source(mixed: Callable, words) -> None:
    config = mixed()
    config["sources"][1]["decoder"] = "pretrain.interleave"
    with pytest.raises(ConfigError, match=r"source documents: .*did you mean 'pretrain.interleaved'"):
        LlmBatches(read_data_settings(config), words)


def test_sources_may_be_named_in_a_mapping(mixed: Callable) -> None:
    config = mixed()
    config["sources"] = {one.pop("name"): one for one in config["sources"]}
    settings = read_data_settings(config)
    assert [source.name for source in settings.sources] == ["captions", "documents", "texts"]
    assert settings.draw_weights() == pytest.approx([4 / 7, 1 / 7, 2 / 7])


def test_a_broken_neighbour_does_not_spoil_a_record_that_takes_its_noise(tmp_path: Path, words, codes: Callable,
                                                                         lines: Callable) -> None:
    good = [{"image_ids": codes(n), "text": f"number {n}"} for n in range(6)]
    bad = ["no json", {"image_ids": [10 ** 9] * len(codes(0)), "text": "a"}, {"image_ids": codes(0)[:-1], "text": "a"},
           {"image_ids": 7, "text": "a"}, {"image_ids": [True] * len(codes(0)), "text": "a"}]
    path = lines(tmp_path / "a.jsonl", [*good, *bad])
    mixture = Mixture(read_data_settings({"sources": [
        {"name": "c", "files": str(path), "decoder": "pretrain.caption",
         "options": {"reverse_ratio": 1.0, "code_noise": 0.9}}]}), words)
    found = [mixture.sequence(0, position) for position in range(4 * 11)]
    assert sum(not isinstance(one, SkippedSample) for one in found) == 4 * len(good)
    assert all("noise" not in one.where for one in found if isinstance(one, SkippedSample))


def test_weights_of_any_size_are_shares(mixed: Callable) -> None:
    for size in (1e308, 1e-300):
        config = mixed()
        for source in config["sources"]:
            source["weight"] = size
        assert read_data_settings(config).draw_weights() == pytest.approx([1 / 3] * 3)


def test_packing_is_switched_by_on_and_off(mixed: Callable) -> None:
    assert read_data_settings(mixed(packing="off")).packing is False
    assert read_data_settings(mixed(packing="on")).packing is True


def test_sources_one_after_another_must_end(mixed: Callable) -> None:
    config = mixed(concat_type="concat")
    config["sources"][0]["cycles"] = 2
    with pytest.raises(ConfigError, match="source 'documents' needs cycles"):
        read_data_settings(config)
    config["sources"][1]["cycles"] = 1
    assert read_data_settings(config).concat_type == "concat"
