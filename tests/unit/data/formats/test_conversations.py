"""Conversations of every format, converted to messages."""

import pytest

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord


def llava(*texts: str, **fields) -> dict:
    """A conversation of LLaVA's form."""
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


OURS = [
    {"role": "user", "content": [{"codes": [[1, 2], [3, 4]]}, "q"]},
    {"role": "assistant", "content": ["a", {"codes": [5, 6]}]},
]
EDIT = {"source_image": "s.jpg", "target_image": "t.jpg", "instruction": "Red."}
A, B = {"image": "a.jpg"}, {"image": "b.jpg"}

# name -> a record, and the contents of its messages
CONVERSATIONS = {
    "llava, two images": (
        llava("<image>q", "a", "And <image>?", "b", image=["a.jpg", "b.jpg"]),
        [[A, "q"], ["a"], ["And ", B, "?"], ["b"]],
    ),
    "llava, joined codes": (
        llava("<image><image>q", "a", image_ids=[1, 2, 3, 4]),
        [[{"codes": [1, 2]}, {"codes": [3, 4]}, "q"], ["a"]],
    ),
    "seed-x": ({"image": "a.jpg", "data": ["q", "a", "q", "b"]}, [[A, "q"], ["a"], ["q"], ["b"]]),
    "ours": ({"messages": OURS, "image": "its source.jpg"}, [turn["content"] for turn in OURS]),
    "the_cauldron": (
        {"images": ["a.jpg"], "texts": [{"user": "q", "assistant": "a"}]},
        [[A, "q"], ["a"]],
    ),
    "qwen-vl": (
        llava("Picture 1: <img>a.jpg</img>\nq", "<img><img_00001><img_00002></img>"),
        [["Picture 1: ", A, "\nq"], [{"codes": [1, 2]}]],
    ),
    "chat api": (
        {
            "messages": [
                {"role": "user", "content": [{"image_url": {"url": "a.jpg"}, "type": "image_url"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            ]
        },
        [[A], ["a"]],
    ),
    "edit with an answer": (
        EDIT | {"instruction_new": "Please, red.", "response": "Here."},
        [[{"image": "s.jpg"}, "Please, red."], ["Here.", {"image": "t.jpg"}]],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_with_messages(name):
    # One decoder trains on the lists of other projects as they are.
    item, contents = CONVERSATIONS[name]
    messages = with_messages(item, "f")["messages"]
    assert [turn["content"] for turn in messages] == contents
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * (len(contents) // 2)


@pytest.mark.parametrize(
    "item",
    [
        {"image_ids": [1], "text": "a"},
        {"image_ids": [[1]], "data": ["q", "a"]},
        {"image_ids": [1, 2], "data": "2020-01-01"},
    ],
)
def test_with_messages_of_other_records(item):
    # Records of other decoders with some of the same fields are unchanged.
    assert with_messages(item, "f") == item


@pytest.mark.parametrize(
    "item, kind, named",
    [
        ({"conversations": [{"from": "cat", "value": "a"}]}, "wrong role", "'cat'"),
        (
            {"conversations": [{"from": "gpt", "value": "<image>a"}], "video": "a.mp4"},
            "other media",
            "",
        ),
        (llava("a", " \n"), "empty text", "turn 2"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "unlearned answer",
            "turn 1",
        ),
        ({"conversations": "not json"}, "malformed json", "'conversations'"),
        (llava("<image>q", "a", image=["a", "b"]), "images and placeholders", "1 .* 2"),
    ],
)
def test_with_messages_of_a_wrong_conversation(item, kind, named):
    # Kinds are counted in the reports.
    with pytest.raises(BadRecord, match=f"^f.jsonl: line 3: .*{named}") as caught:
        with_messages(item, "f.jsonl: line 3")
    assert caught.value.kind == kind
