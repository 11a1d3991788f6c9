"""The contract of all decoders: sequences and labels, missing fields, odd values, long records.

Exact ids and labels: golden fixtures.
"""

import copy
import random
from collections.abc import Iterator

import pytest
from data_files import jpeg, lines
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.data.decoders import decoder_names, get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.decoders.features import ImageSequence
from seed_multimodal.data.formats.bad_records import BROKEN
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.source import open_sources
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.vocabulary import IGNORE_INDEX

# GLM-Image's have positions with axes, and tests of their own.
NAMES = sorted(name for name in decoder_names() if not name.startswith("glm_image."))
IMAGE = Image.new("RGB", (448, 448))
TABLES = read_tables(__file__)
ODD = (
    *(None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**40),
    *("", " ", "n/a", "a" * 5000, "\ud83d", "[" * 900),
    *([], [[]], [None], ["", 1], [1.5] * 4, {}, {"a": {}}, [{}], [{"role": "user"}]),
)


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_a_good_record(tokenizer_of, records, name):
    record = records(IMAGE)[name]
    decoder = get_decoder(name, tokenizer_of(name))
    complete = decoder.decode(record, SeededRandom(3, 1))
    assert not complete.drop_reason
    pairs = list(zip(complete.labels, complete.ids, strict=True))
    assert all(label in (IGNORE_INDEX, id) for label, id in pairs)
    # Without the end as a target a model never stops.
    assert complete.labels[-1] == complete.ids[-1]
    if not name.startswith("lavit."):
        assert complete.ids[0] == decoder.tokenizer.bos_token_id
        assert complete.ids[-1] == decoder.tokenizer.eos_token_id
    # All randomness is the rng's, so that a resumed run repeats it.
    assert decoder.decode(record, SeededRandom(3, 1)) == complete

    # Truncated: the beginning, with all of its images; else the record is dropped.
    for longest in range(1, len(complete) + 1):
        cut = decoder.decode(record, SeededRandom(3, 1), longest)
        learns = set(complete.labels[:longest]) != {IGNORE_INDEX}
        if isinstance(complete, ImageSequence):
            first = complete.input_positions + complete.target_positions
            fits = max(first, default=-1) + 1 < longest
            assert not cut.drop_reason or not (fits and learns) or longest >= len(complete) - 1
            if cut.drop_reason:
                continue
            assert fits
            assert cut.input_positions + cut.target_positions == first
        elif not learns:
            assert cut.drop_reason
            continue
        assert (cut.ids, cut.labels) == (complete.ids[:longest], complete.labels[:longest])


@pytest.mark.parametrize("name", NAMES)
def test_decode_without_a_field(tokenizer_of, records, name):
    # The message names the field, so that a user can rename it.
    record = records(IMAGE)[name]
    for key in record:
        if key == "image" and name == "seed_x.conversation":  # a text conversation
            continue
        fields = {other: value for other, value in record.items() if other != key}
        # A shorter story has an image too many; `data` may be there in place of `outputs`.
        named = {"caption2": "image_ids", "outputs": "data"}.get(key, key)
        with pytest.raises(BadRecord, match=named):
            get_decoder(name, tokenizer_of(name)).decode(fields, SeededRandom(0))


@pytest.mark.parametrize("case", TABLES["broken"], ids=str)
def test_decode_of_a_broken_record(tokenizer_of, records, case):
    name = case["decoder"]
    fields = records(IMAGE)[name] | case["fields"]
    with pytest.raises(BadRecord, match=case["named"]):
        get_decoder(name, tokenizer_of(name)).decode(fields, SeededRandom(0))


@pytest.mark.parametrize("case", TABLES["dropped"], ids=str)
def test_decode_drops_unusable_records(tokenizer_of, records, case):
    # Dropped, not broken: data sets have many of them, and they end no run.
    name = case["decoder"]
    decoder = get_decoder(name, tokenizer_of(name), case["options"])
    record = records(IMAGE)[name]
    assert not decoder.decode(record, SeededRandom(0)).drop_reason
    change = {"image": IMAGE.resize(case["size"])} if "size" in case else case["fields"]
    assert decoder.decode(record | change, SeededRandom(0)).drop_reason


# ---- odd values


def items(value) -> Iterator[tuple]:
    """(container, key) of everything in a record."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from items(value[key])


def changed(record, rng) -> dict:
    """The record with one to three odd values, or without one of its fields."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(items(record)) or [(record, "text")])
        if rng.random() < 0.1 and key in container and isinstance(container, dict):
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return record


@pytest.mark.parametrize("name", NAMES)
def test_read_of_records_with_odd_values(tokenizer_of, records, tmp_path, name):
    # A sequence, or a broken record by its line: another error would end a run.
    (tmp_path / "a.jpg").write_bytes(jpeg(0, 24, 16))
    record = records("a.jpg")[name] | records("a.jpg", "optional").get(name, {})
    rng = random.Random(name)
    path = lines(tmp_path / "a.jsonl", [record, *(changed(record, rng) for _ in range(60))])
    source = {
        "files": str(path),
        "decoder": name,
        "options": TABLES["options"].get(name, {}),
        "cycles": 1,
    }
    settings = read_data_settings({"sources": [source], "length": 4000})
    (opened,) = open_sources(settings, tokenizer_of(name))
    results = [opened.read(position) for position in range(61)]
    broken = [result.note for result in results if result.note and result.note.kind == BROKEN]
    assert any(result.samples for result in results)
    assert len(broken) > 5
    for note in broken:
        assert note.location.startswith(f"{path}: line ")
        assert "\n" not in note.location
        assert not note.location.startswith(f"{path}: line 1:")  # the unchanged record


# ---- options


def test_get_decoder_with_an_option_of_another_decoder(tokenizer):
    with pytest.raises(ConfigError, match="reverse_ratio"):
        get_decoder("sft.difference", tokenizer, {"reverse_ratio": 0.5})


def test_decode_of_views_and_several_captions(tokenizer, codes):
    # Over many epochs a run sees every view with every caption.
    fields = {"views": [codes(0), codes(1)], "text": ["a cat", "a small cat"]}
    decoder = get_decoder("pretrain.caption", tokenizer, {"reverse_ratio": 1.0})
    sequences = {tuple(decoder.decode(fields, SeededRandom(seed)).ids) for seed in range(40)}
    assert sequences == {
        tuple(decoder.decode({"image_ids": view, "text": text}, SeededRandom(0)).ids)
        for view in fields["views"]
        for text in fields["text"]
    }

    first = get_decoder("pretrain.caption", tokenizer, {"first_text": 1.0})
    texts = {first.decode(fields, SeededRandom(seed)).extra["text"] for seed in range(20)}
    assert texts == {"a cat"}


def test_seeded_random_repeats_its_values():
    # A resumed run must have the values of the first one, also after an update of Python.
    rng = SeededRandom(5, 6)
    order = list(range(8))
    rng.shuffle(order)
    values = (rng.uniform(), rng.randint(0, 1000), rng.choice("abcdefgh"), order)
    assert values == (0.6832392450925442, 612, "e", [4, 1, 2, 5, 3, 0, 6, 7])
