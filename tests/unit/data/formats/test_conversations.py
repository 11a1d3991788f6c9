"""Conversations of every format, converted to messages."""

from __future__ import annotations

import pytest

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord


def messages(item: dict) -> list:
    return [
        (turn["role"], turn["content"]) for turn in with_messages(item, "f: line 1")["messages"]
    ]


def test_with_messages_llava():
    item = {
        "id": "1",
        "image": "coco/1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    assert messages(item) == [
        ("user", [{"image": "coco/1.jpg"}, "\nWhat?"]),
        ("assistant", ["A cat."]),
        ("user", ["Sure?"]),
        ("assistant", ["Yes."]),
    ]
    both = item | {"image": ["a.jpg", "b.jpg"]}
    with pytest.raises(BadRecord, match="f: line 1: 1 <image> placeholder for 2 images") as caught:
        messages(both)
    assert caught.value.kind == "images and placeholders"
    both["conversations"][2]["value"] = "And <image>?"
    assert messages(both)[2] == ("user", ["And ", {"image": "b.jpg"}, "?"])
    with pytest.raises(BadRecord, match="2 <image> placeholders for 0 images"):
        messages(item | {"image": None})
    assert messages(item | {"image_ids": [1, 2, 3, 4]})[0][1][0] == {
        "codes": [1, 2]
    }  # two images, concatenated
    assert messages(item | {"image_ids": [[1, 2, 3], [4, 5, 6]]})[2][1][1] == {"codes": [4, 5, 6]}


def test_with_messages_other_formats():
    seed_x = {"image": "/a.jpg", "data": ["q", "a", "q2", "a2"]}
    assert (
        messages(seed_x)[0] == ("user", [{"image": "/a.jpg"}, "q"]) and len(messages(seed_x)) == 4
    )
    assert messages(seed_x | {"image": "null"})[0] == ("user", ["q"])
    chat = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ],
        "images": ["x.png"],
    }
    assert messages(chat) == [("user", [{"image": "x.png"}, "q"]), ("assistant", ["a"])]
    assert with_messages(chat, "w")["system"] == "Be kind."
    ours = {
        "messages": [
            {"role": "user", "content": [{"codes": [[1, 2], [3, 4]]}, "q"]},
            {"role": "assistant", "content": ["a", {"codes": [5, 6]}]},
        ],
        "image": "where it came from.jpg",
    }
    assert with_messages(ours, "w")["messages"] == ours["messages"]
    edit = {"source_image": "s.jpg", "target_image": "t.jpg", "instruction": "Red."}
    assert messages(edit) == [
        ("user", [{"image": "s.jpg"}, "Red."]),
        ("assistant", [{"image": "t.jpg"}]),
    ]
    polite = edit | {"instruction_new": "Please, red.", "response": "Here."}
    assert messages(polite)[1] == ("assistant", ["Here.", {"image": "t.jpg"}])
    codes = edit | {"source_image": None, "source_image_ids": [1]}
    for unchanged in (
        {"image_ids": [1], "text": "a"},
        codes,
        {"image_ids": [[1]], "data": ["q", "a"]},
        {"data": ["only one"]},
        {"text": "a"},
        {"image_ids": [1, 2], "data": "2020-01-01"},
    ):
        assert with_messages(unchanged, "w") == unchanged


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        ({"conversations": ["hello"]}, "wrong type", "must be a list of turns, not .'hello'"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "wrong role", "its role is 'cat'"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}]},
            "wrong role",
            "turn 1 is the assistant's",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            "wrong role",
            "ends without an answer",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}]},
            "empty text",
            "turn 2",
        ),
        ({"conversations": "not json"}, "malformed json", "'conversations': is not JSON"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "missing key",
            "a part has neither",
        ),
    ],
)
def test_with_messages_wrong_conversation(item, kind, message):
    with pytest.raises(BadRecord, match="^f.jsonl: line 3: .*" + message) as caught:
        with_messages(item, "f.jsonl: line 3")
    assert caught.value.kind == kind
