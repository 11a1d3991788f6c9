"""Conversations of every format, converted to messages."""

from __future__ import annotations

from typing import Any

import pytest

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    """A conversation of LLaVA's form."""
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


PARTS = [{"type": "image"}, {"type": "text", "text": "q"}]
CHAT = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "a"}]
OURS = [
    {"role": "user", "content": [{"codes": [[1, 2], [3, 4]]}, "q"]},
    {"role": "assistant", "content": ["a", {"codes": [5, 6]}]},
]
EDIT = {"source_image": "s.jpg", "target_image": "t.jpg", "instruction": "Red."}
A, B = {"image": "a.jpg"}, {"image": "b.jpg"}

# name -> a record, and the contents of its messages
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "llava": (llava("<image>\nq", "a", image="a.jpg"), [[A, "\nq"], ["a"]]),
    "llava, two images": (
        llava("<image>q", "a", "And <image>?", "b", image=["a.jpg", "b.jpg"]),
        [[A, "q"], ["a"], ["And ", B, "?"], ["b"]],
    ),
    "llava, joined codes": (
        llava("<image><image>q", "a", image_ids=[1, 2, 3, 4]),
        [[{"codes": [1, 2]}, {"codes": [3, 4]}, "q"], ["a"]],
    ),
    "llava, lists of codes": (
        llava("<image>q", "a", "<image>", "b", image_ids=[[1, 2, 3], [4, 5, 6]]),
        [[{"codes": [1, 2, 3]}, "q"], ["a"], [{"codes": [4, 5, 6]}], ["b"]],
    ),
    "seed-x": ({"image": "a.jpg", "data": ["q", "a", "q", "b"]}, [[A, "q"], ["a"], ["q"], ["b"]]),
    "seed-x, no image": ({"image": "null", "data": ["q", "a"]}, [["q"], ["a"]]),
    "chat with images": ({"messages": CHAT, "images": ["a.jpg"]}, [[A, "q"], ["a"]]),
    "ours": ({"messages": OURS, "image": "its source.jpg"}, [turn["content"] for turn in OURS]),
    "edit": (EDIT, [[{"image": "s.jpg"}, "Red."], [{"image": "t.jpg"}]]),
    "edit with an answer": (
        EDIT | {"instruction_new": "Please, red.", "response": "Here."},
        [[{"image": "s.jpg"}, "Please, red."], ["Here.", {"image": "t.jpg"}]],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_with_messages(name):
    item, contents = CONVERSATIONS[name]
    messages = with_messages(item, "f")["messages"]
    assert [turn["content"] for turn in messages] == contents
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * (len(contents) // 2)


def test_with_messages_of_a_system_message():
    item = {"messages": [{"role": "system", "content": "Be kind."}, *CHAT], "images": ["x.png"]}
    fields = with_messages(item, "f")
    assert fields["system"] == "Be kind."
    assert len(fields["messages"]) == 2


@pytest.mark.parametrize(
    "item",
    [
        {"image_ids": [1], "text": "a"},
        EDIT | {"source_image": None, "source_image_ids": [1]},
        {"image_ids": [[1]], "data": ["q", "a"]},
        {"data": ["only one"]},
        {"text": "a"},
        {"image_ids": [1, 2], "data": "2020-01-01"},
    ],
)
def test_with_messages_of_other_records(item):
    assert with_messages(item, "f") == item


@pytest.mark.parametrize(
    ("item", "kind", "named"),
    [
        ({"conversations": ["hello"]}, "wrong type", "'hello'"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "wrong role", "'cat'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "wrong role", "turn 1"),
        (llava("a"), "wrong role", ""),
        (llava("a", " \n"), "empty text", "turn 2"),
        ({"conversations": "not json"}, "malformed json", "'conversations'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "missing key",
            "",
        ),
        (llava("<image>q", "a"), "images and placeholders", "1 .* 0"),
        (llava("<image>q", "a", image=["a", "b"]), "images and placeholders", "1 .* 2"),
    ],
)
def test_with_messages_of_a_wrong_conversation(item, kind, named):
    with pytest.raises(BadRecord, match=f"^f.jsonl: line 3: .*{named}") as caught:
        with_messages(item, "f.jsonl: line 3")
    assert caught.value.kind == kind
