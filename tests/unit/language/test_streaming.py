"""`AnswerReader`: events of an answer token by token, equal to its parts; stops at the user's
next turn."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_nano.train.words import train_text_tokenizer

MARKER = "\nUSER:"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    texts = [
        "USER: What is this?\nASSISTANT: a red apple on the table.",
        "Here is an image of a blue fish.",
    ] * 5
    return train_text_tokenizer(
        MultimodalTokenizer, texts, tmp_path_factory.mktemp("words"), vocab_size=320, n_codes=16
    )


def read_all(
    tokenizer: MultimodalTokenizer, ids: list[int], *stops: str, after: str = ""
) -> tuple[AnswerReader, list]:
    reader = AnswerReader(tokenizer, stops or [MARKER], after=after)
    events = []
    for id in ids:
        events += reader.read(id)
    return reader, events + reader.close()


def test_read_returns_events_with_their_tokens(tokenizer: MultimodalTokenizer):
    codes = [k % 16 for k in range(32)]
    ids = [
        *tokenizer.encode("Here is é it."),
        *tokenizer.vocabulary.image_ids(codes),
        *tokenizer.encode("a fish"),
        tokenizer.eos_token_id,
    ]
    reader, events = read_all(tokenizer, ids)
    assert reader.ids == ids and reader.finished
    kinds = [event["type"] for event in events]
    start = kinds.index("image_start")
    assert (
        kinds[start + 1] == "image" and events[start + 1]["codes"] == codes and start > 3
    )  # text is in pieces
    assert "".join(e["text"] for e in events[:start]) == "Here is é it."
    assert "".join(e["text"] for e in events[start + 2 :]) == "a fish"
    assert not any("\ufffd" in event.get("text", "") for event in events)


def test_read_returns_previews_with_their_codes(tokenizer: MultimodalTokenizer):
    codes = [k % 16 for k in range(32)]
    ids = [
        *tokenizer.encode("Two:"),
        *2 * tokenizer.vocabulary.image_ids(codes),
        tokenizer.eos_token_id,
    ]
    reader = AnswerReader(tokenizer, [MARKER], (16, 8, 32))
    previews = []
    for index, id in enumerate(ids):
        previews += [
            (index, event["codes"]) for event in reader.read(id) if event["type"] == "image_preview"
        ]
    begins = [index + 1 for index, id in enumerate(ids) if id == tokenizer.vocabulary.boi_id]
    assert previews == [(begin + k - 1, codes[:k]) for begin in begins for k in (8, 16, 32)]
    broken = AnswerReader(
        tokenizer, [MARKER], (8,)
    )  # an unconstrained model may generate text between codes
    odd = [
        tokenizer.vocabulary.boi_id,
        *tokenizer.encode("a"),
        *tokenizer.vocabulary.code_to_id(codes[:9]),
    ]
    assert not [
        event for id in odd for event in broken.read(id) if event["type"] == "image_preview"
    ]


@pytest.mark.parametrize(
    ("text", "marker", "answer"),
    [
        ("a red apple\nUSER: What is this?", MARKER, "a red apple"),
        ("a red  apple ", MARKER, "a red  apple "),
        ("one\nUSEFUL\nUS", MARKER, "one\nUSEFUL\nUS"),
        ("one\nUSER: two", "", "one\nUSER: two"),
    ],
)
def test_read_ends_at_a_stop(tokenizer: MultimodalTokenizer, text, marker, answer):
    reader, events = read_all(tokenizer, tokenizer.encode(text), marker)
    assert "".join(event["text"] for event in events) == tokenizer.decode(reader.ids) == answer


def test_read_drops_the_space_before_the_next_turn(tokenizer: MultimodalTokenizer):
    """Models tuned on dialogues generate it; the next turn's prompt would contain it twice."""
    answer = tokenizer.encode("a red apple.")
    ids = tokenizer.encode_parts(["a red apple.", "\nUSER: What"])
    assert tokenizer.decode(ids[: len(answer) + 1]) == "a red apple. "
    reader, events = read_all(tokenizer, ids)
    assert "".join(event["text"] for event in events) == "a red apple." and reader.ids == answer


def test_read_ends_at_a_stop_behind_an_image(tokenizer: MultimodalTokenizer):
    codes = [k % 16 for k in range(32)]
    image = tokenizer.vocabulary.image_ids(codes)
    ids = tokenizer.encode_parts(["Two: ", codes, "\nUSER: What"], strip=False)
    reader, events = read_all(tokenizer, [*ids, *image])
    assert [event["type"] for event in events if event["type"] != "text"] == [
        "image_start",
        "image",
    ]
    assert reader.ids[-len(image) :] == image and reader.parts[0] == "Two: "


def test_read_ends_at_a_stop_without_an_answer_before_it(tokenizer: MultimodalTokenizer):
    reader, events = read_all(tokenizer, tokenizer.encode_parts(["", "\nUSER: What is this?"]))
    assert reader.finished and not events and not reader.ids and not reader.parts


def test_read_goes_on_behind_line_breaks_before_the_first_word(
    tokenizer: MultimodalTokenizer,
):
    reader, _ = read_all(tokenizer, tokenizer.encode("\n \n a fish\nin the sea"), "\n", "question:")
    assert tokenizer.decode(reader.ids).strip() == "a fish"


def test_read_equals_read_all_for_any_ids(tokenizer: MultimodalTokenizer):
    """For random sequences with broken images, the events contain the parts of the whole answer."""
    rng = random.Random(0)
    v = tokenizer.vocabulary
    for _ in range(150):
        ids: list[int] = []
        for _ in range(rng.randint(1, 6)):
            count = rng.choice([32, 32, 32, 31, 3])
            ids += rng.choice(
                [
                    tokenizer.encode("a fish"),
                    [v.boi_id, *[v.n_text + rng.randrange(16) for _ in range(count)], v.eoi_id],
                    [v.boi_id, *[v.n_text + 1] * count],
                    [v.eoi_id],
                    [v.n_text + 2] * rng.randint(1, 3),
                ]
            )
        _, events = read_all(tokenizer, ids)
        kinds = groupby(
            (event for event in events if event["type"] != "image_start"),
            lambda event: event["type"],
        )
        read = [
            item
            for kind, group in kinds
            for item in (
                ["".join(event["text"] for event in group).strip()]
                if kind == "text"
                else [event.get("codes") or event["reason"] for event in group]
            )
        ]
        assert read == [
            part.strip()
            if isinstance(part, str)
            else part.codes
            if isinstance(part, ImagePart)
            else part.reason
            for part in AnswerReader(tokenizer).read_all(ids).parts
        ], ids


def test_read_after_a_marker_drops_the_text_before_it(tokenizer: MultimodalTokenizer):
    reader, events = read_all(
        tokenizer, tokenizer.encode("red, blue - a red apple. And more"), ".", after=" - "
    )
    text = "".join(event["text"] for event in events)
    assert text.strip() == "a red apple" and tokenizer.decode(reader.ids).endswith("a red apple")
    plain, _ = read_all(tokenizer, tokenizer.encode("a fish. And more"), ".", after=" - ")
    assert tokenizer.decode(plain.ids) == "a fish"
