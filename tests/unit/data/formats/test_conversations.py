"""Conversations of every format, converted to messages."""

import re

import pytest

from seed_multimodal.data.formats.conversations import (
    JOINED,
    LEARNED,
    NOT_LEARNED,
    REPAIRED,
    not_a_conversation,
    with_messages,
)
from seed_multimodal.data.formats.record import BadRecord


def llava(*texts: str, **fields) -> dict:
    """A conversation of LLaVA's form."""
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def ask(content="q", **keys) -> dict:
    return {"role": "user", "content": content, **keys}


def tell(content="a", **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


def chat(*turns: dict, **fields) -> dict:
    """A conversation of chat APIs."""
    return {"messages": list(turns), **fields}


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
        chat(
            ask([{"image_url": {"url": "a.jpg"}, "type": "image_url"}]),
            tell([{"type": "output_text", "text": "a"}]),
        ),
        [[A], ["a"]],
    ),
    # Parts as tables and Anthropic's API have them.
    "part with text and image": (
        chat(ask([{"image": "a.jpg", "text": "q"}]), tell()),
        [[A, "q"], ["a"]],
    ),
    "part with its content": (
        chat(ask([{"type": "image", "source": {"type": "base64", "data": "a.jpg"}}]), tell()),
        [[A], ["a"]],
    ),
    "row of a table": (
        chat(ask([{"type": "text", "text": "q", "bytes": None, "path": None}]), tell(name="")),
        [["q"], ["a"]],
    ),
    # Images of a turn, as Ollama has them; an answer is a sentence, then its image.
    "images of turns": (
        chat(ask(images=["a.jpg"]), tell(image={"path": "b.jpg", "bytes": None})),
        [[A, "q"], ["a", B]],
    ),
    "image without text": (chat(ask(None, image="a.jpg"), tell()), [[A], ["a"]]),
    "images of a turn at its placeholders": (
        chat(ask("<image2>q<image1>", images=["b.jpg", "a.jpg"]), tell(), image="its source.jpg"),
        [[A, "q", B], ["a"]],
    ),
    # Columns of any name, and several that name one file.
    "image_path": (chat(ask("<image>q"), tell(), image_path="a.jpg", size=3), [[A, "q"], ["a"]]),
    "content": (chat(ask("<image>q"), tell(), img=b"x"), [[{"image": b"x"}, "q"], ["a"]]),
    "one file twice": (
        chat(ask("<image>q"), tell(), image="a.jpg", file_name="x\\a.jpg", id="b.jpg"),
        [[A, "q"], ["a"]],
    ),
    "content with its name": (
        chat(ask("<image>q"), tell(), image={"bytes": b"x"}, file_name="a.jpg"),
        [[{"image": b"x"}, "q"], ["a"]],
    ),
    # Forms of other programs: Alpaca, ms-swift, TRL.
    "alpaca": (
        {"instruction": "q", "input": "b", "output": "a", "image": "a.jpg"},
        [[A, "q\nb"], ["a"]],
    ),
    "history": (
        {"query": "q", "response": "a", "history": [["p", "b"]], "images": ["a.jpg"]},
        [[A, "p"], ["b"], ["q"], ["a"]],
    ),
    "history as text": (
        {"instruction": "q", "input": "", "output": "a", "history": '[["p", "b"]]'},
        [["p"], ["b"], ["q"], ["a"]],
    ),
    "prompt": ({"prompt": "[IMG]q", "completion": "a", "image": "a.jpg"}, [[A, "q"], ["a"]]),
    "prompt of messages": (
        {"prompt": [ask(), tell("b"), ask("r")], "completion": [tell()]},
        [["q"], ["b", "unlearned"], ["r"], ["a"]],
    ),
    # Answers that give context; what follows the last learned one teaches nothing.
    "unlearned": (
        chat(ask(weight=0), tell(weight=0), ask(), tell(weight=1), ask(), tell(train=False)),
        [["q"], ["a", "unlearned"], ["q"], ["a"]],
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
    marks = [[] if turn.get("learned", True) else ["unlearned"] for turn in messages]
    assert [turn["content"] + mark for turn, mark in zip(messages, marks, strict=True)] == contents
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * (len(contents) // 2)
    # What pre-tokenizing wrote is read once more.
    assert with_messages({"messages": messages}, "f")["messages"] == messages


@pytest.mark.parametrize(
    "value, learned", [(1, True), (0.0, False), ("false", False), (None, True)]
)
@pytest.mark.parametrize("key", LEARNED)
def test_with_messages_keeps_the_masks_of_other_programs(key, value, learned):
    # A bad answer is context: it must not be learned, and what follows it is read after it.
    record = chat(ask(), tell(**{key: value}), ask(), tell())
    if key == "mask" and value is not None:
        with pytest.raises(BadRecord, match="turn 2 of 'messages': 'mask'"):  # 1 means either
            with_messages(record, "f")
        return
    if not LEARNED[key] and value is not None:
        learned = not learned
    first = with_messages(record, "f")["messages"][1]
    assert first.get("learned", True) is learned


@pytest.mark.parametrize(
    "item",
    [
        {"image_ids": [1], "text": "a"},
        {"image_ids": [[1]], "data": ["q", "a"]},
        {"image_ids": [1, 2], "data": "2020-01-01"},
        {"image_ids": [1], "texts": [{"user": "q"}, {"user": "q", "assistant": "a"}]},
        {"instruction": "q", "response": "a", "prompt": "p", "image_path": "a.jpg"},
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
        ({"conversations": "not json"}, "malformed json", "'conversations'"),
        # Turns without a learned answer, or with a mask that may mean the one or the other.
        (chat(ask(), tell(weight=0)), "unlearned answer", "no answer"),
        (chat(tell()), "no answer", "no question"),
        (chat(ask(), tell(), train=False), "unlearned answer", "'train'"),
        (chat(ask(), tell(), loss_mask=[0, 1]), "unlearned answer", "'loss_mask'"),
        (chat(ask(), tell(weight=0.5)), "unclear loss", "turn 2 .*'weight' is 0.5"),
        (
            chat(ask(), tell(train_detail=[{"train": False}])),
            "unread key",
            "turn 2 .*'train_detail'",
        ),
        (chat(ask(train=True), tell()), "unclear loss", "turn 1 .*'train'"),
        (chat(ask(), tell(), tell(train=False)), "unclear loss", r"turn 3 \(the assistant's\)"),
        # Images of turns, parts and columns that nobody would see.
        (llava("<image>q", "a", image=["a", "b"]), "images and placeholders", "1 .* 2 .*'a'"),
        (
            chat(ask("<image>", images=["a", "b"]), tell()),
            "images and placeholders",
            "turn 1.*1 .* 2",
        ),
        (chat(ask("<image>"), tell()), "images and placeholders", "1 .* 0 images"),
        (chat(ask("<image2> <image3>"), tell(), images=["a", "b"]), "images and placeholders", ""),
        (chat(ask(), tell(), image_path="a.jpg"), "images and placeholders", "0 .*a.jpg"),
        (chat(ask("<image>"), tell(), image="a.jpg", image_2="b.jpg"), "unread image", "'image_2'"),
        (chat(ask("<image>"), tell(), image1="a.jpg", image2="b.jpg"), "unread image", "'image2'"),
        (
            chat(ask(attachments=[{"path": "a.jpg"}]), tell()),
            "unread key",
            "turn 1 .*'attachments'",
        ),
        (chat(ask([{"text": "q", "video": "a.mp4"}]), tell()), "unread key", "'video'"),
        (chat(ask([{"type": "video", "path": "a.mp4"}]), tell()), "missing key", "turn 1"),
        (chat(ask([5]), tell()), "missing key", "turn 1"),
        # Answers without text.
        (chat(ask(), tell(None, tool_calls=[{"id": 1}])), "unread key", "turn 2 .*'tool_calls'"),
        (chat(ask(), tell(None)), "missing key", "turn 2 .*'content'"),
        ({"query": "q", "response": 4}, "wrong type", "4"),
        ({"query": "q", "response": "a", "history": [["q"]]}, "wrong type", "'q'"),
        ({"instruction": "q", "input": {"a": 1}, "output": "a"}, "wrong type", "'a'"),
    ],
)
def test_with_messages_of_a_wrong_conversation(item, kind, named):
    # Kinds are counted in the reports.
    with pytest.raises(BadRecord, match=f"^f.jsonl: line 3: .*{named}") as caught:
        with_messages(item, "f.jsonl: line 3")
    assert caught.value.kind == kind


def test_with_messages_says_what_it_repaired():
    # Losses of such records are counted in the reports.
    fields = with_messages(chat(ask(), tell(), tell(), ask(), tell(train=False)), "f")
    assert fields[REPAIRED].startswith(JOINED) and fields[REPAIRED].endswith(NOT_LEARNED)
    assert REPAIRED not in with_messages(chat(ask(), tell()), "f")
    # The forms that would have been read.
    error = not_a_conversation({"question": "q", "answer": "a"})
    assert re.search("messages, .*instruction with output.*answer, question", str(error))
