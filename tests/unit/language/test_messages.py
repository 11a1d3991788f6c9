"""Messages of a conversation: what is read of every format, and what is refused by its number."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_images import noise
from yaml_tables import read_tables

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.answer import Answer, BrokenImagePart, ImagePart
from seed_multimodal.language.messages import (
    Message,
    image_conversations,
    read_messages,
    request_texts,
    speaks_of_missing_image,
    without_oldest_rounds,
)

IMAGE = noise(1, (3, 2))
PNG = base64.b64decode(image_to_base64(IMAGE))
CODES = [3, 1, 2]
CAT = Path("cat.png")
IMAGES = (IMAGE, CAT, PNG, io.BytesIO(PNG), np.asarray(IMAGE))
ROWS_OF_CODES = (CODES, range(3), np.array(CODES, ">u2"), torch.tensor(CODES, dtype=torch.int32))
# Parts in the formats of transformers and OpenAI → what they hold.
PARTS = [
    ({"type": "text", "text": "a"}, "a"),
    ({"type": "image", "codes": CODES}, CODES),
    ({"type": "image", "image": IMAGE}, IMAGE),
    ({"type": "image", "path": "cat.png"}, CAT),
    ({"type": "image", "url": "cat.png"}, CAT),
    ({"type": "image", "url": "file:///my%20cat.png"}, Path("/my cat.png")),
    ({"type": "image", "base64": image_to_base64(IMAGE)}, PNG),
    ({"type": "image", "image": {"bytes": PNG, "path": "cat.png"}}, PNG),
    ({"type": "image_url", "image_url": {"url": "cat.png"}}, CAT),
    ({"type": "image_url", "image_url": "cat.png"}, CAT),
]


def user(content) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("item", ["a fish", *IMAGES, *ROWS_OF_CODES], ids=type)
def test_read_messages_keeps_what_it_knows(item):
    # In a list, and alone, as most callers write it.
    [together] = read_messages([user([item, "what?"])])
    [alone] = read_messages([user(item)])
    assert together.content[0] is item and alone.content[0] is item
    is_text = isinstance(item, str)
    assert (together.is_text, together.text) == (is_text, f"{item} what?" if is_text else "what?")
    is_image = any(item is image for image in IMAGES)
    assert len(together.images) == is_image and all(image is item for image in together.images)
    assert read_messages([alone]) == [alone]


@pytest.mark.parametrize("part, item", PARTS)
def test_read_messages_of_chat_parts(part, item):
    # A name is a file's: nothing is downloaded.
    for content in (part, [part]):
        assert read_messages([user(content)]) == [Message("user", (item,))]


def test_read_messages_of_earlier_answers():
    # Broken images are no part of the conversation.
    parts = ["Here.", BrokenImagePart([5], "broken"), ImagePart(CODES)]
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": Answer(parts)}
    assert read_messages([system, user("Draw."), answer, user("Again.")]) == [
        Message("system", ("Be kind.",)),
        Message("user", ("Draw.",)),
        Message("assistant", ("Here.", ImagePart(CODES))),
        Message("user", ("Again.",)),
    ]
    assert read_messages([Message("raw", ("Once",))]) == [Message("raw", ("Once",))]


REFUSED = [
    *read_tables(__file__),
    {"messages": [{"role": "system", "content": [IMAGE]}, user("a")], "named": "0"},
    {"messages": [user(torch.ones(()))], "named": "0"},
]


@pytest.mark.parametrize("row", REFUSED)
def test_read_messages_names_the_message_it_refuses(row):
    # An error of a request, or of the image in a data URL.
    with pytest.raises(SeedError, match=row.get("named")):
        read_messages(row["messages"])


@given(
    turns=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    system=st.booleans(),
    count=st.integers(0, 6),
)
def test_without_oldest_rounds_drops_questions_and_their_answers(turns, system, count):
    """turns: the number of answers behind each question."""
    conversation = [Message("system", ("Be kind.",))] * system
    drawn = []
    for index, n_answers in enumerate(turns):
        answers = [Message("assistant", (f"answer {index}",))] * n_answers
        drawn.append([Message("user", (f"question {index}",)), *answers])
        conversation += drawn[-1]
    kept = drawn[min(count, len(drawn) - 1) :]
    expected = conversation[:system] + [message for turn in kept for message in turn]
    assert without_oldest_rounds(conversation, count) == expected


@pytest.mark.parametrize(
    "images, texts, named",
    [([IMAGE, []], "a", "1"), ([IMAGE, IMAGE], ["a"], "2"), (IMAGE, ["a", "b"], "2")],
)
def test_image_conversations_of_missing_images_or_texts(images, texts, named):
    # A list that is one text short must not pair texts with other images.
    with pytest.raises(RequestError, match=named):
        image_conversations(images, texts)


@pytest.mark.parametrize("texts", [None, ["a", None], CAT])
def test_request_texts_names_what_is_no_text(texts):
    with pytest.raises(RequestError, match="is no text"):
        request_texts(texts)


@pytest.mark.parametrize(
    "text, missing",
    [
        ("Describe the picture.", True),
        ("What is in my photo?", True),
        ("Draw the picture of a dog.", False),
        ("Make a picture.", False),
    ],
)
def test_speaks_of_missing_image(text, missing):
    assert speaks_of_missing_image([Message("user", (text,))]) is missing
    assert not speaks_of_missing_image([Message("user", (IMAGE, text))])
    assert not speaks_of_missing_image([Message("assistant", (CODES,)), Message("user", (text,))])
