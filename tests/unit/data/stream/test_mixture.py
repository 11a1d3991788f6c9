"""The mixture of an LLM's sources: shares, skipped records, errors that end a run, settings."""

import itertools

import pytest
from data_files import lines
from repository import NANO
from tiny import write_json
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.data.decoders import DECODERS
from seed_multimodal.data.decoders.seed_llama_pretrain import Text
from seed_multimodal.data.stream.config import read_data_settings, read_once
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # few cores
TABLES = read_tables(__file__)
CAPTIONS, DOCUMENTS, TEXTS = 66, 30, 35  # records of the sets of `mixed`


def chosen_sources(tokenizer, record_numbers, config, count) -> list[int]:
    """The source of each of the first chunks."""
    batches = LlmBatches(read_data_settings(config), tokenizer)
    return [record_numbers(batch)[0] // 1000 for batch in itertools.islice(batches, count)]


def unpacked(config, cycles: tuple[int | None, ...] = ()) -> dict:
    """The configuration with a record for each chunk."""
    for source in config["sources"]:
        source["batch_size"] = 1
    for source, count in zip(config["sources"], cycles, strict=False):
        source["cycles"] = count
    return config | {"packing": False}


def test_order_of_sources_depends_on_the_seed(mixed, tokenizer, record_numbers):
    # A resumed run must choose as before, also after an update.
    config = unpacked(mixed(seed=3))
    chosen = chosen_sources(tokenizer, record_numbers, config, 50)
    assert chosen[:12] == [0, 0, 0, 1, 0, 2, 0, 2, 0, 0, 0, 1]
    config["seed"] += 1
    assert chosen_sources(tokenizer, record_numbers, config, 50) != chosen


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_weights_hold_whatever_is_dropped(tmp_path, tokenizer, packing, workers):
    # As in the original, where filters are before batches: full micro-batches of 8 and 4, twice as
    # many of the source with two fifths of its records.
    sources = []
    for name, n_kept, size in (("all", 5, 8), ("filtered", 2, 4)):
        texts = [{"text": f"number {n}" if n % 5 < n_kept else ""} for n in range(500)]
        path = str(lines(tmp_path / f"{name}.jsonl", texts))
        source = {"name": name, "files": path, "decoder": "pretrain.text", "weight": 8 / size}
        sources.append({**source, "batch_size": size, "max_length": 40})
    config = {"sources": sources, "packing": packing, "length": 128}
    with LlmBatches(read_data_settings(config), tokenizer, workers=workers) as batches:
        sizes = {len(batch.input_ids) for batch in itertools.islice(batches, 300)}
        report = batches.report()["sources"]
    assert sizes == ({1} if packing else {8, 4})
    complete, filtered = (report[name]["sequences"] for name in ("all", "filtered"))
    assert complete / filtered == pytest.approx(1, abs=0.2)
    assert report["filtered"]["draws"] / filtered == pytest.approx(5 / 2, abs=0.2)


@pytest.mark.parametrize("case", TABLES["turns"], ids=str)
def test_sources_one_after_another(mixed, tokenizer, record_numbers, tmp_path, capsys, case):
    # Behind an endless source a run would learn from that alone, without a word.
    cycles, endless, never_drawn = case.values()
    config = unpacked(mixed(concat_type="concat"), cycles)
    run = tmp_path / "run.yaml"
    write_json(run, {"tokenizer": str(NANO / "seed_tokenizer"), "data": config})
    if endless is None:
        order = [0] * 2 * CAPTIONS + [1] * DOCUMENTS + [2] * TEXTS
        assert chosen_sources(tokenizer, record_numbers, config, len(order)) == order
        assert main(f"data check {run} --records 1".split()) == 0
        return
    message = f"never draws from source {never_drawn}, since source {endless}"
    with pytest.raises(ConfigError, match=message):
        LlmBatches(read_data_settings(config), tokenizer)
    assert main(f"data check {run} --records 1".split()) == 2
    assert message in capsys.readouterr().err
    # Held-out data is read once, so that no source is endless.
    LlmBatches(read_once(read_data_settings(config)), tokenizer)


# ---- long sequences


def batches_of(tokenizer, path, decoder: str, **settings) -> LlmBatches:
    """The batches of a file, whose source is `s`."""
    source = {"files": str(path), "decoder": decoder, "name": "s", "cycles": 1}
    return LlmBatches(read_data_settings({"sources": [source], **settings}), tokenizer)


@pytest.mark.parametrize("case", TABLES["long"], ids=str)
def test_report_of_long_sequences(tmp_path, tokenizer, monkeypatch, case):
    # A decoder of texts of another package.
    monkeypatch.setitem(DECODERS, "mine", type("Mine", (Text,), {"name": "mine"}))
    too_long, packing, reason, sequences = case.values()
    texts = [f"number {n} " + "many words follow " * (80 if n in (3, 5) else 1) for n in range(8)]
    path = lines(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    options = {"length": 40, "too_long": too_long, "packing": packing}
    batches = batches_of(tokenizer, path, "mine", **options)
    assert list(batches)
    report = batches.report()["sources"]["s"]
    assert (report["draws"], report["epochs"]) == (8, 1)
    assert report["sequences"] == sequences
    (entry,) = report["skipped"].values()
    assert reason in next(iter(report["skipped"]))
    assert entry["count"] == 2
    assert {location.partition(" (")[0] for location in entry["first"]} == {
        f"{path}: line {line}" for line in (4, 6)
    }


def test_long_captions_are_not_split(tmp_path, tokenizer):
    # A second piece would be a text without its image.
    captions = [{"image_ids": [1] * 32, "text": text} for text in ("short", "long " * 99)]
    path = lines(tmp_path / "c.jsonl", captions)
    batches = batches_of(tokenizer, path, "pretrain.caption", length=60, too_long="split")
    assert len([*batches]) == 1
    (entry,) = batches.report()["sources"]["s"]["skipped"].values()
    assert entry["count"] == 1


# ---- broken records


def caption_and_texts(folder, captions: list, **settings) -> dict:
    """Sources c and t: captions, and 50 good texts that are read much more often."""
    lines(folder / "c.jsonl", captions)
    lines(folder / "t.jsonl", [{"text": "words " * 9}] * 50)
    common = {"batch_size": 8, "max_length": 60}
    sources = {
        "c": {"files": str(folder / "c.jsonl"), "decoder": "pretrain.caption", **common},
        "t": {"files": str(folder / "t.jsonl"), "decoder": "pretrain.text", **common, "weight": 3},
    }
    return {"sources": sources, "length": 60, **settings}


@pytest.mark.process
@pytest.mark.parametrize("workers, packing", [(1, True), (0, False)])
def test_next_after_many_broken_records(tmp_path, tokenizer, workers, packing):
    good = {"image_ids": [1] * 32, "text": "x", "metadata": {}}
    bad = {**good, "image_ids": [1, 2]}
    # Good records in between begin the count again; those of other sources do not.
    captions = [good, *[bad] * 199]
    config = caption_and_texts(tmp_path, captions, max_bad_in_a_row=130, packing=packing)
    logged = []
    options = read_data_settings(config)
    batches = LlmBatches(options, tokenizer, workers=workers, log=logged.append)
    with batches, pytest.raises(DataError, match=r"source c: 130 .*c\.jsonl: line \d+"):
        for _ in batches:
            pass
    counts = batches.report()["sources"]["c"]["skipped"]
    (entry,) = counts.values()
    assert entry["count"] >= 130
    # The log stays short: the first five are named.
    assert len(entry["first"]) == len(set(logged)) == len(logged) == 5


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("record, named", [({}, "image_ids"), ({"text": "."}, "c.jsonl")])
def test_source_without_a_usable_record(tmp_path, tokenizer, packing, record, named):
    # A run ends before its first step, even if the source is hardly ever read.
    bad = {"image_ids": [1] * 32, **record} if record else {"image": "a.jpg"}
    good = {"image_ids": [1] * 32, "text": "x"}
    config = caption_and_texts(tmp_path, [bad] * 300, packing=packing)
    with pytest.raises(DataError, match=f"Source c: .*{named}"):
        LlmBatches(read_data_settings(config), tokenizer)
    # One good record is enough.
    config = caption_and_texts(tmp_path, [bad] * 50 + [good], packing=packing)
    LlmBatches(read_data_settings(config), tokenizer)
