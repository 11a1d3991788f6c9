"""`Mixture`: the source of each sample, skipped records, errors that end a run, settings of
sources.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from data_files import lines

from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("concat", [0, 0, 0, 1, 2, 2, None]), ("mux_longest", [0, 1, 2, 0, 2, 0, None])],
)
def test_choice(mixed, tokenizer, kind, expected):
    mixture = Mixture(read_data_settings(mixed()), tokenizer)
    counts = [0, 0, 0]
    limits = [3, 1, 2]
    choices = []
    by_weight = Counter(
        mixture.choose_source([0, 0, 0], [True] * 3, draw) for draw in range(20_000)
    )
    assert [by_weight[source] / 20_000 for source in range(3)] == pytest.approx(
        [4 / 7, 1 / 7, 2 / 7], abs=0.011
    )
    left = Counter(
        mixture.choose_source([0, 0, 0], [False, True, True], draw) for draw in range(20_000)
    )
    assert left[0] == 0 and left[1] / 20_000 == pytest.approx(1 / 3, abs=0.011)
    mixture.settings.concat_type = kind
    for draw in range(7):
        source = mixture.choose_source(
            counts, [count < limit for count, limit in zip(counts, limits, strict=True)], draw
        )
        choices.append(source)
        if source is not None:
            counts[source] += 1
    assert choices == expected


def test_report_of_long_sequences(
    tmp_path,
    tokenizer,
):
    lines(
        tmp_path / "t.jsonl",
        [{"text": f"number {n} " + "many words follow " * (40 if n == 3 else 1)} for n in range(8)],
    )
    config = {
        "sources": [
            {
                "name": "t",
                "files": str(tmp_path / "t.jsonl"),
                "decoder": "pretrain.text",
                "cycles": 1,
            }
        ],
        "length": 40,
    }
    reports = {}
    for kind in ("skip", "truncate", "split"):
        batches = LlmBatches(read_data_settings({**config, "too_long": kind}), tokenizer)
        assert list(batches)
        reports[kind] = batches.report()["sources"]["t"]
    for kind, name in (("skip", "skipped"), ("truncate", "cut"), ("split", "split")):
        entry = reports[kind]["skipped"][f"too long, {name}"]
        assert entry["count"] == 1 and entry["first"][0].startswith(
            f"{tmp_path / 't.jsonl'}: line 4 ("
        )
    assert [reports[kind]["sequences"] for kind in ("skip", "truncate")] == [7, 8]
    assert reports["split"]["sequences"] > 9
    assert [(report["draws"], report["epochs"]) for report in reports.values()] == [(8, 1)] * 3
    assert reports["split"]["tokens"] > reports["truncate"]["tokens"] > reports["skip"]["tokens"]


@pytest.mark.process
@pytest.mark.parametrize(("workers", "packing"), [(1, True), (0, False)])
def test_next_after_many_broken_records(tmp_path, tokenizer, workers, packing):
    bad = [{"image_ids": [1, 2], "text": "x", "metadata": {}}] * 199
    lines(tmp_path / "c.jsonl", [{"image_ids": [1] * 32, "text": "x", "metadata": {}}, *bad])
    lines(tmp_path / "t.jsonl", [{"text": "words " * 9}] * 50)
    sources = [
        {
            "name": name,
            "files": str(tmp_path / f"{name}.jsonl"),
            "decoder": f"pretrain.{kind}",
            "batch_size": 8,
            "max_length": 60,
        }
        for name, kind in (("c", "caption"), ("t", "text"))
    ]
    config = {"sources": sources, "length": 60, "max_bad_in_a_row": 130, "packing": packing}
    sentence = r"130 consecutive records of source c are broken, the last: .*c\.jsonl: line \d+"
    with (
        LlmBatches(read_data_settings(config), tokenizer, workers=workers) as batches,
        pytest.raises(DataError, match=sentence),
    ):
        for _ in batches:
            pass


@pytest.mark.parametrize("packing", [True, False])
def test_check_usable_of_a_broken_source(tmp_path, tokenizer, packing):
    lines(tmp_path / "c.jsonl", [{"image": "a.jpg", "caption": "x"}] * 300)
    lines(tmp_path / "t.jsonl", [{"text": "words"}] * 50)
    config = {
        "sources": [
            {
                "name": "t",
                "files": str(tmp_path / "t.jsonl"),
                "decoder": "pretrain.text",
                "weight": 99,
            },
            {"name": "c", "files": str(tmp_path / "c.jsonl"), "decoder": "pretrain.caption"},
        ],
        "length": 60,
        "packing": packing,
    }
    with pytest.raises(
        DataError,
        match=r"Source c: no usable record \(100 records tried\); the first: .*: "
        "image_ids: missing; decoder pretrain.caption needs it",
    ):
        LlmBatches(read_data_settings(config), tokenizer)


def test_choice_of_micro_batches(mixed, tokenizer):
    """Weights 4 : 1 : 2 count micro-batches, so the shares of sequences are weight x batch_size."""
    config = mixed()
    for source, size in zip(config["sources"], (1, 8, 2), strict=True):
        source["batch_size"] = size
    batches = LlmBatches(read_data_settings(config), tokenizer)
    assert len(list(itertools.islice(batches, 200))) == 200
    counts = np.array([source["sequences"] for source in batches.report()["sources"].values()])
    assert counts / counts.sum() == pytest.approx(np.array([4, 8, 4]) / 16, abs=0.05)


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        ({"lenght": 4}, {}, "did you mean 'length'"),
        ({"too_long": "splitt"}, {}, "did you mean 'split'"),
        ({"sources": []}, {}, "at least one source"),
        ({}, {"wieght": 1}, "did you mean 'weight'"),
        ({}, {"weight": 0}, r"sources\[0\] \(captions\): weight must be above 0, not 0"),
        ({}, {"name": "texts"}, "duplicate source name 'texts'"),
    ],
)
def test_read_data_settings_with_wrong_values(mixed, change, source, message):
    config = mixed(**change)
    if source:
        config["sources"][0].update(source)
    with pytest.raises(ConfigError, match=message):
        read_data_settings(config)


def test_read_data_settings_of_a_mapping(mixed):
    config = mixed(packing="off")  # the value of an override
    config["sources"] = {source.pop("name"): source for source in config["sources"]}
    settings = read_data_settings(config)
    assert [source.name for source in settings.sources] == ["captions", "documents", "texts"]
    assert (
        settings.sampling_weights() == pytest.approx([4 / 7, 1 / 7, 2 / 7])
        and settings.packing is False
    )


def test_long_documents_are_split_at_images(tmp_path, tokenizer, codes):
    """Every text token and image of a long document is used.

    Without packing it is cut, as in the original.
    """
    images = [codes(1), None, codes(2), None, None]
    rows = [
        {"image_ids": images, "texts": [None, "many words " * count, None, "b", "c"]}
        for count in (5, 300)
    ]
    lines(tmp_path / "d.jsonl", rows)
    source = {
        "name": "d",
        "files": str(tmp_path / "d.jsonl"),
        "decoder": "pretrain.interleaved",
        "cycles": 1,
        "options": {"reverse_ratio": 0.0},
    }
    config = {"sources": [source], "length": 128, "too_long": "split"}
    (opened,) = Mixture(read_data_settings(config), tokenizer).sources
    short, long = sorted(map(opened.read, range(2)), key=lambda read: len(read.pieces))
    assert len(short.pieces) == 1 and short.note is None
    assert len(long.pieces) > 3 and long.note is not None and long.note.reason == "too long, split"
    ids = np.concatenate([piece.ids for piece in long.pieces])
    begin = tokenizer.vocabulary.boi_id
    end = tokenizer.vocabulary.eoi_id
    assert (ids == begin).sum() == (ids == end).sum() == 2
    for piece in long.pieces:
        assert len(piece) <= 128 and (piece.ids == begin).sum() == (piece.ids == end).sum()
    padded = Mixture(read_data_settings({**config, "packing": False}), tokenizer)
    assert max(len(padded.sources[0].read(position).pieces[0]) for position in range(2)) == 128
