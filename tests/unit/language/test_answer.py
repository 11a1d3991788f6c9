"""An answer's tokens as texts and images: at once, streamed, and up to a stop."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny.language import write_hub_tokenizer
from tiny.seed import SENTENCES

from seed_multimodal.inference.prompt import GenerationSettings, ends_at_stop
from seed_multimodal.language.answer import AnswerReader, BrokenImagePart, Event, ImagePart
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.text_tokenizer import TextTokenizer

STOP = "\nUSER:"
CODES = [1, 2, 3, 4, 5]


def read_all(tokenizer, ids: list[int], *stops: str) -> tuple[AnswerReader, list[Event]]:
    """The reader, and all events in order."""
    reader = AnswerReader(tokenizer, stops)
    events = []
    for id in ids:
        events += reader.read(id)
    return reader, events + reader.close()


def text_of(events: list[Event]) -> str:
    return "".join(event.get("text", "") for event in events)


def ids_of(tokenizer, parts: list[str | list[int]], ends: str) -> list[int]:
    """ends: which of `<img>` and `</img>` each image has, in turn."""
    vocabulary = tokenizer.vocabulary
    ids = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            ids += tokenizer.encode(part)
            continue
        kind = ends[index % len(ends)]
        ids += [vocabulary.boi_id] if kind in "bs" else []
        ids += vocabulary.code_to_id(part)
        ids += [vocabulary.eoi_id] if kind in "be" else []
    return ids


@pytest.fixture(scope="module")
def tokenizers(tokenizer, seedx_tokenizer, tmp_path_factory) -> list[TextTokenizer]:
    folder = write_hub_tokenizer(tmp_path_factory.mktemp("hub"), SENTENCES)
    return [tokenizer, seedx_tokenizer, HubTokenizer.create(folder, 24, 5)]


TEXTS = st.text(st.sampled_from("a fish\n.USER: 漢é"), max_size=30)
SHARES = st.floats(0, 1, exclude_max=True)  # of the text tokens, or of a text's length
STOPS = st.sampled_from([STOP, ".", "fish", "\n", "a a"]) | st.tuples(SHARES, st.integers(1, 4))


@given(
    index=st.integers(0, 2),
    content=TEXTS | st.lists(SHARES, max_size=30),
    stops=st.lists(STOPS, max_size=2),
    opening=st.just(0.0) | SHARES,
)
@example(index=0, content="Here is the picture. A fish.", stops=["."], opening=0.7)
@example(index=0, content="one\nUSEFUL\nUS", stops=[STOP], opening=0.0)
@example(index=0, content="a red apple. \nUSER: What", stops=[STOP], opening=0.0)
@example(index=0, content="漢字 é\nUS and\nUSER: no", stops=[STOP], opening=0.0)
@example(index=1, content="\n \n a fish\nin the sea", stops=["\n", "question:"], opening=0.0)
@example(
    index=2, content=[0.25, 0.5, 0.375], stops=[(0.0, 2)], opening=0.0
)  # half a character behind
def test_streamed_text_ends_at_the_first_stop(tokenizers, index, content, stops, opening):
    # Stops begin inside of tokens, and characters in several: a page must not show what the
    # answer has not, nor the reverse.
    tokenizer = tokenizers[index]
    if isinstance(content, str):
        ids = tokenizer.encode(content)
    else:
        ids = [int(share * tokenizer.vocabulary.n_text) for share in content]
        ids = [id for id in ids if id not in tokenizer.eos_token_ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    texts = []
    for stop in stops:
        if isinstance(stop, tuple):  # a part of this text
            start = int(stop[0] * len(whole))
            stop = whole[start : start + stop[1]]
            if stop.strip() != stop or "\ufffd" in stop:
                continue
        texts += [stop] if stop else []

    # Stops begin behind an opening that is the system's; those of white space count behind the
    # first word only; spaces before a stop are dropped.
    n_opening = int(opening * len(ids))
    opened = tokenizer.decode(ids[:n_opening], skip_special_tokens=True).rstrip("\ufffd")
    first_word = len(whole) - len(whole.lstrip())
    starts = [max(len(opened), 0 if stop.strip() else first_word) for stop in texts]
    ends = [whole.find(stop, start) for stop, start in zip(texts, starts, strict=True)]
    ends = [end for end in ends if end >= 0]
    expected = opened + whole[len(opened) : min(ends)].rstrip(" ") if ends else whole

    # The engine and transformers' `generate` end at the same token.
    settings = GenerationSettings(stop=tuple(texts))
    reader = AnswerReader(tokenizer, texts, n_opening=n_opening)
    for length, id in enumerate(ids, 1):
        reader.read(id)
        if length > n_opening:
            ended = ends_at_stop(tokenizer, settings, ids[:length], n_opening)
            assert ended == reader.found_stop
        if reader.found_stop:
            break

    reader = AnswerReader(tokenizer, texts, n_opening=n_opening)
    events = [event for id in ids for event in reader.read(id)]
    assert not ends or text_of(events) == expected  # as soon as the stop was read
    events += reader.close()
    assert text_of(events).rstrip(" ") == expected.rstrip(" ")
    assert reader.parts == ([text_of(events)] if expected.strip() else [])
    assert reader.found_stop == bool(ends)
    # The answer's tokens are the text's: the next turn of a chat reads them.
    assert reader.ids == ids[: len(reader.ids)]
    assert expected.startswith(tokenizer.decode(reader.ids, skip_special_tokens=True).rstrip(" "))


def test_long_answers_are_read_in_linear_time(tokenizer):
    # Small models with long contexts would spend most of their time on reading.
    ids = tokenizer.encode("It is a cat. Please draw a red apple! " * 300)[:4000]
    assert len(ids) == 4000
    start = time.process_time()
    read_all(tokenizer, ids, STOP)
    assert time.process_time() - start < 0.3


@pytest.mark.parametrize(
    "content, ends, named",
    [
        ([1] * 6, "b", "6"),
        ([], "e", "<img>"),
        ([1, 1], "n", "<img>"),
        ([1, 1], "s", "2 of 5"),
    ],
)
def test_a_broken_image_names_its_fault_and_harms_no_other(tokenizer, content, ends, named):
    ids = ids_of(tokenizer, [content], ends)
    good = tokenizer.vocabulary.image_ids(CODES)
    parts = AnswerReader(tokenizer).read_all([*tokenizer.encode("before"), *ids, *good]).parts
    text, broken, image = parts
    assert (text, image) == ("before", ImagePart(CODES))
    assert isinstance(broken, BrokenImagePart)
    assert broken.ids == ids and named in broken.reason
