"""Reading an answer token by token: same parts as reading it whole, and it ends where the user's turn would begin."""

from __future__ import annotations

import random

import pytest

from seed_multimodal.language.answer import BrokenImagePart, ImagePart, TextPart, split_answer
from seed_multimodal.language.streaming import AnswerReader, tokens_from_thread
from seed_multimodal.language.tokenizer import MultimodalTokenizer

MARKER = "\nUSER:"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> MultimodalTokenizer:
    texts = ["USER: What is this?\nASSISTANT: a red apple on the table.", "Here is the picture of a blue fish."] * 5
    return MultimodalTokenizer.train(texts, tmp_path_factory.mktemp("words"), vocab_size=320, n_codes=16)


def read_all(words: MultimodalTokenizer, ids: list[int], marker: str = MARKER) -> tuple[AnswerReader, list[dict]]:
    reader, events = AnswerReader(words, [marker]), []
    for id in ids:
        events += reader.read(id)
    return reader, events + reader.close()


def test_events_come_with_their_tokens(words: MultimodalTokenizer) -> None:
    codes = [k % 16 for k in range(32)]
    ids = [*words.encode("Here is é it."), *words.vocabulary.image_ids(codes), *words.encode("a fish"), words.eos_id]
    reader, events = read_all(words, ids)
    assert reader.ids == ids and reader.finished
    kinds = [event["type"] for event in events]
    start = kinds.index("image_start")
    assert kinds[start + 1] == "image" and events[start + 1]["codes"] == codes and start > 3  # text came in pieces
    assert "".join(e["text"] for e in events[:start]) == "Here is é it."
    assert "".join(e["text"] for e in events[start + 2:]) == "a fish"
    assert not any("\ufffd" in event.get("text", "") for event in events)


def test_previews_come_with_the_codes_they_are_made_of(words: MultimodalTokenizer) -> None:
    codes = [k % 16 for k in range(32)]
    ids = [*words.encode("Two:"), *2 * words.vocabulary.image_ids(codes), words.eos_id]
    reader, seen = AnswerReader(words, [MARKER], (16, 8, 32)), []
    for place, id in enumerate(ids):
        seen += [(place, event["codes"]) for event in reader.read(id) if event["type"] == "image_preview"]
    begins = [place + 1 for place, id in enumerate(ids) if id == words.vocabulary.boi_id]
    assert seen == [(begin + k - 1, codes[:k]) for begin in begins for k in (8, 16, 32)]
    broken = AnswerReader(words, [MARKER], (8,))  # an unconstrained model may write words among the codes
    odd = [words.vocabulary.boi_id, *words.encode("a"), *words.vocabulary.code_to_id(codes[:9])]
    assert not [event for id in odd for event in broken.read(id) if event["type"] == "image_preview"]


def test_the_answer_ends_where_the_user_would_speak(words: MultimodalTokenizer) -> None:
    said = words.encode("a red apple")
    beyond = [*words.encode("\nUSER: What is this?"), *words.vocabulary.image_ids([0] * 32)]
    reader, events = read_all(words, said + beyond)
    assert "".join(event["text"] for event in events).strip() == "a red apple"
    assert words.decode(reader.ids).strip() == "a red apple" and reader.finished


def test_the_blank_that_begins_the_next_turn_is_no_part_of_the_answer(words: MultimodalTokenizer) -> None:
    """Models tuned on dialogues write it; kept in the answer it would stand twice in the next turn's prompt."""
    said = words.encode("a red apple.")
    ids = words.encode_parts(["a red apple.", "\nUSER: What"])
    assert words.decode(ids[:len(said) + 1]) == "a red apple. "
    reader, events = read_all(words, ids)
    assert "".join(event["text"] for event in events) == "a red apple." and reader.ids == said
    reader, events = read_all(words, words.encode("a red  apple "))
    assert "".join(event["text"] for event in events) == "a red  apple "


@pytest.mark.parametrize(("text", "marker"), [("one\nUSEFUL\nUS", MARKER), ("one\nUSER: two", "")])
def test_read_keeps_what_is_no_marker(words: MultimodalTokenizer, text: str, marker: str) -> None:
    _, events = read_all(words, words.encode(text), marker)
    assert "".join(event["text"] for event in events) == text


def test_any_ids_read_as_they_split(words: MultimodalTokenizer) -> None:
    """Random sequences, broken pictures included: the events say what `split_answer` says of the whole."""
    rng = random.Random(0)
    v = words.vocabulary
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randint(1, 6)):
            count = rng.choice([32, 32, 32, 31, 3])
            ids += rng.choice([
                words.encode("a fish"), [v.boi_id, *[v.n_text + rng.randrange(16) for _ in range(count)], v.eoi_id],
                [v.boi_id, *[v.n_text + 1] * count], [v.eoi_id], [v.n_text + 2] * rng.randint(1, 3)])
        _, events = read_all(words, ids)
        told: list[object] = []
        for event in events:
            if event["type"] == "text":
                told.append(event["text"])
            elif event["type"] != "image_start":
                told.append(event.get("codes") or event["reason"])
        merged: list[object] = []
        for item in told:
            if isinstance(item, str) and merged and isinstance(merged[-1], str) and item not in _reasons(ids, words) \
                    and merged[-1] not in _reasons(ids, words):
                merged[-1] += item
            else:
                merged.append(item)
        want = [part.text if isinstance(part, TextPart) else part.codes if isinstance(part, ImagePart) else part.reason
                for part in split_answer(ids, words)]
        assert [m.strip() if isinstance(m, str) else m for m in merged] == \
            [w.strip() if isinstance(w, str) else w for w in want], ids


def _reasons(ids: list[int], words: MultimodalTokenizer) -> set[str]:
    return {part.reason for part in split_answer(ids, words) if isinstance(part, BrokenImagePart)}


def test_an_error_in_the_thread_is_raised_here() -> None:
    def produce(streamer: object) -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        list(tokens_from_thread(produce))


def test_a_verdict_before_the_answer_is_not_given_out(words: MultimodalTokenizer) -> None:
    ids = words.encode("red, blue - a red apple. And more")
    reader, given = AnswerReader(words, ["."], after=" - "), []
    for id in ids:
        given += reader.read(id)
    text = "".join(event["text"] for event in given + reader.close())
    assert text.strip() == "a red apple" and words.decode(reader.ids).endswith("a red apple")
    plain = AnswerReader(words, ["."], after=" - ")
    plain.read_all(words.encode("a fish. And more"))
    assert words.decode(plain.ids) == "a fish"
