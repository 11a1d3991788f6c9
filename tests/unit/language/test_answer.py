"""An answer's tokens as texts and images: at once, streamed, and up to a stop."""

import time
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny.language import write_hub_tokenizer
from tiny.seed import SENTENCES

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


@st.composite
def segments(draw) -> list[str | list[int]]:
    """Texts of all kinds, and images (codes; 5 are an image) which may be broken at both ends."""
    text = st.text(st.sampled_from("a fish\n.U漢é😀\t"), max_size=8)
    codes = st.lists(st.integers(0, 23), min_size=0, max_size=7) | st.just(CODES)
    return draw(st.lists(text | codes, max_size=6))


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


@given(parts=segments(), ends=st.text("bbbsen", min_size=1, max_size=4), closes=st.booleans())
@example(parts=["a", CODES, "", CODES[::-1], "b"], ends="b", closes=True)
def test_streamed_events_are_the_parts_of_the_whole_answer(tokenizer, parts, ends, closes):
    # What a page has shown while it streamed must be what the answer holds.
    ids = ids_of(tokenizer, parts, ends) + [tokenizer.eos_token_id] * closes
    reader, events = read_all(tokenizer, ids)
    streamed = []
    shown = [event for event in events if event["type"] != "image_start"]
    for kind, group in groupby(shown, lambda event: event["type"]):
        if kind == "text":
            text = text_of(list(group))
            streamed += [text] if text.strip() else []
        else:
            streamed += [event.get("codes", event.get("reason")) for event in group]

    whole = AnswerReader(tokenizer).read_all(ids)
    expected = []
    for part in whole.parts:
        if isinstance(part, ImagePart):
            start = part.position
            assert whole.ids[start - 1 : start + 6] == tokenizer.vocabulary.image_ids(part.codes)
            expected.append(part.codes)
        else:
            expected.append(part.reason if isinstance(part, BrokenImagePart) else part)
    assert streamed == expected
    assert reader.ids == whole.ids == ids
    assert reader.finished


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
)
@example(index=0, content="one\nUSEFUL\nUS", stops=[STOP])
@example(index=0, content="a red apple. \nUSER: What", stops=[STOP])
@example(index=0, content="漢字 é\nUS and\nUSER: no", stops=[STOP])
@example(index=1, content="\n \n a fish\nin the sea", stops=["\n", "question:"])
@example(index=2, content=[0.25, 0.5, 0.375], stops=[(0.0, 2)])  # half a character behind
def test_streamed_text_ends_at_the_first_stop(tokenizers, index, content, stops):
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

    # Stops of white space count behind the first word only; spaces before a stop are dropped.
    first_word = len(whole) - len(whole.lstrip())
    ends = [whole.find(stop, 0 if stop.strip() else first_word) for stop in texts]
    ends = [end for end in ends if end >= 0]
    expected = whole[: min(ends)].rstrip(" ") if ends else whole

    reader = AnswerReader(tokenizer, texts)
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
