"""LaVIT's decoders: ids, labels, over-long and bad records."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.decoders.features import ImageSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.lavit.processing import LavitTokenizer
from seed_nano.train.words import train_text_tokenizer

TEXTS = ["a red cat Question: What is it? Answer: a dog make it blue"] * 30
IMAGE = Image.new("RGB", (20, 10))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> LavitTokenizer:
    return train_text_tokenizer(
        LavitTokenizer,
        TEXTS,
        tmp_path_factory.mktemp("words"),
        vocab_size=290,
        n_codes=8,
        tokens_per_image=16,
    )


def make(
    tokenizer: LavitTokenizer,
    name: str,
    fields: dict[str, Any],
    longest: int | None = None,
    seed: int = 1,
    **options: Any,
) -> ImageSequence:
    sequence = get_decoder(f"lavit.{name}", tokenizer, options).decode(
        fields, SeededRandom(seed), longest
    )
    assert isinstance(sequence, ImageSequence)
    return sequence


def learned(sequence: ImageSequence) -> list[int]:
    pairs = list(zip(sequence.ids, sequence.labels, strict=True))
    assert all(label in (IGNORE_INDEX, id) for id, label in pairs)
    return [label for _, label in pairs if label != IGNORE_INDEX]


def test_decode_caption_in_both_directions(tokenizer: LavitTokenizer):
    """An image of 16 patches has 6 placeholders (three eighths)."""
    start = 290
    end = 291
    code = 292
    text = tokenizer.text_ids("a red cat")
    read = make(tokenizer, "caption", {"image": IMAGE, "text": "a red cat"}, img_first_ratio=1.0)
    assert read.ids == [start, *[code] * 6, end, *text, tokenizer.eos_token_id] and learned(
        read
    ) == [
        *text,
        tokenizer.eos_token_id,
    ]
    assert (
        read.input_positions == list(range(1, 7))
        and not read.target_positions
        and not read.images[0].is_target
    )
    generated = make(
        tokenizer,
        "caption",
        {"image": IMAGE, "text": [" a red cat "]},
        img_first_ratio=0.0,
        text_dropout=0.0,
    )
    assert generated.ids == [*text, start, *[code] * 6, end] and learned(generated) == [
        *[code] * 6,
        end,
    ]
    assert (
        generated.target_positions == list(range(len(text) + 1, len(text) + 7))
        and generated.images[0].is_target
    )
    alone = make(
        tokenizer,
        "caption",
        {"image": IMAGE, "text": "a red cat"},
        img_first_ratio=0.0,
        text_dropout=1.0,
    )
    assert alone.ids == [start, *[code] * 6, end] and learned(alone) == [*[code] * 6, end]
    seeds = [
        make(tokenizer, "caption", {"image": IMAGE, "text": "a"}, seed=seed).images[0].seed
        for seed in (1, 1, 2)
    ]
    assert seeds[0] == seeds[1] != seeds[2]


def test_decode_question_and_compose(tokenizer: LavitTokenizer):
    question = tokenizer.text_ids("Question: What is it? Answer:")
    answer = tokenizer.text_ids("a dog")
    sequence = make(
        tokenizer, "question", {"image": IMAGE, "question": "What is it?", "answer": "a dog"}
    )
    assert sequence.ids == [290, *[292] * 6, 291, *question, *answer, 2] and learned(sequence) == [
        *answer,
        2,
    ]
    fields = {"source_image_ids": [1, 2], "target_image": IMAGE, "instruction": "make it blue"}
    both = make(tokenizer, "compose", fields, text_dropout=0.0)
    before = [293, 294, *tokenizer.text_ids("make it blue"), 290]
    assert both.ids == [*before, *[292] * 6, 291] and learned(both) == [*[292] * 6, 291]
    assert (
        both.target_positions == list(range(len(before), len(before) + 6)) and len(both.images) == 1
    )
    sequence = make(
        tokenizer,
        "compose",
        {**fields, "source_image_ids": None, "source_image": IMAGE},
        text_dropout=0.0,
    )
    assert (
        len(sequence.images) == 2
        and len(sequence.target_positions) == 12
        and learned(sequence) == [*[292] * 6, 291]
    )


def test_decode_caption_that_is_too_long(tokenizer: LavitTokenizer):
    """A caption that is a label is cut; the sample of a caption to generate from is dropped."""
    fields = {"image": IMAGE, "text": "a red cat " * 10}
    cut = make(tokenizer, "caption", fields, longest=20, img_first_ratio=1.0)
    assert len(cut.ids) == 20 and cut.n_truncated > 0 and not cut.drop_reason
    generated = make(
        tokenizer, "caption", fields, longest=20, img_first_ratio=0.0, text_dropout=0.0
    )
    assert "do not fit into 20 tokens" in generated.drop_reason


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("caption", {"image": IMAGE, "text": " . "}, "text: is empty"),
        ("caption", {"image": "cat.jpg", "text": "a cat"}, "image: must be a Image"),
        ("caption", {"image_ids": [1, 8], "text": "a cat"}, "image codes are 0 to 7"),
        ("caption", {"image_ids": [1] * 17, "text": "a cat"}, "an image has 1 to 16 codes, not 17"),
    ],
)
def test_decode_broken_records(tokenizer: LavitTokenizer, name, fields, sentence):
    with pytest.raises(BadRecord, match=sentence):
        make(tokenizer, name, fields)
