"""Conversations of every format, converted to messages."""

import re

import pytest
from yaml_tables import read_tables

from seed_multimodal.data.formats.conversations import (
    JOINED,
    LEARNED,
    NOT_LEARNED,
    REPAIRED,
    not_a_conversation,
    with_messages,
)
from seed_multimodal.data.formats.record import BadRecord

CASES = read_tables(__file__)


@pytest.mark.parametrize("case", CASES["read"].values(), ids=CASES["read"])
def test_with_messages(case):
    # One decoder trains on the lists of other projects as they are.
    contents = case["contents"]
    messages = with_messages(case["record"], "f")["messages"]
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
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    record = {"messages": [question, {**answer, key: value}, question, answer]}
    if key == "mask" and value is not None:
        with pytest.raises(BadRecord, match="turn 2 of 'messages': 'mask'"):  # 1 means either
            with_messages(record, "f")
        return
    if not LEARNED[key] and value is not None:
        learned = not learned
    first = with_messages(record, "f")["messages"][1]
    assert first.get("learned", True) is learned


@pytest.mark.parametrize("item", CASES["others"], ids=str)
def test_with_messages_of_other_records(item):
    # Records of other decoders with some of the same fields are unchanged.
    assert with_messages(item, "f") == item


@pytest.mark.parametrize("case", CASES["refused"], ids=str)
def test_with_messages_of_a_wrong_conversation(case):
    # Kinds are counted in the reports.
    named = case.get("named", "")
    with pytest.raises(BadRecord, match=f"^f.jsonl: line 3: .*{named}") as caught:
        with_messages(case["record"], "f.jsonl: line 3")
    assert caught.value.kind == case["kind"]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_system_messages_of_fields_and_of_turns_are_one(field):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    first = {"role": "system", "content": "Be kind."}
    for record in (
        {"messages": turns, field: "Be kind."},
        {"messages": [first, *turns], field: "Be kind."},
    ):
        assert with_messages(record, "f")["system"] == "Be kind."


def test_with_messages_says_what_it_repaired():
    # Losses of such records are counted in the reports.
    fields = with_messages(CASES["repaired"], "f")
    assert [turn["content"] for turn in fields["messages"]] == [["q"], ["a\nb"]]
    assert fields[REPAIRED].startswith(JOINED) and fields[REPAIRED].endswith(NOT_LEARNED)
    assert REPAIRED not in with_messages(CASES["read"]["seed-x"]["record"], "f")
    # The forms that would have been read.
    error = not_a_conversation({"question": "q", "answer": "a"})
    assert re.search("messages, .*instruction with output.*answer, question", str(error))
