"""The nano set as input: captions, questions, descriptions, drawings, edits and conversations of one split.

Requests are those of the nano systems (`language.tasks`), so that training and use agree. Pictures keep their bytes on
disk; equal ones are encoded once per unit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.nano.load import NanoSet, load_nano
from seed_multimodal.data.nano.types import NanoRecord
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.language.tasks import NANO_TASKS

Made = tuple[str, dict[str, Any], list[str]]  # name of a record, its fields, keys of its pictures


def nano_records(folder: str, settings: InputSettings) -> list[Record]:
    """The records of the set that the settings describe, in the set's order; `members`: their pictures by key.

    Raises:
        DataError: no set there, or an unknown split.
    """
    return _records(folder, settings.split, settings.content, settings.captions)


@functools.lru_cache(maxsize=2)
def _records(folder: str, split: str, content: str, captions: str) -> list[Record]:
    nano = _set(folder)
    records = [nano.records[index] for index in nano.split(split)]
    made = {"captions": lambda: _captions(records, captions), "qa": lambda: _questions(records),
            "describe": lambda: _descriptions(records), "draw": lambda: _drawings(records, captions),
            "edits": lambda: _edits(nano, split), "conversations": lambda: _conversations(nano, split)}[content]()
    bytes_of = {record.key: nano.picture(index) for index, record in enumerate(nano.records)}
    return [Record(name, f"{nano.folder}: {name}", fields, {key: bytes_of[key] for key in keys}, str(nano.folder))
            for name, fields, keys in made]


@functools.lru_cache(maxsize=1)
def _set(folder: str) -> NanoSet:
    return load_nano(folder)


def _chosen(record: NanoRecord, captions: str) -> list[str]:
    return {"first": record.captions[:1], "others": record.captions[1:]}.get(captions, record.captions)


def _captions(records: Sequence[NanoRecord], captions: str) -> Iterator[Made]:
    for record in records:
        if captions == "list":
            yield f"{record.key} captions", {"image": record.key, "caption": record.captions}, [record.key]
            continue
        for number, text in enumerate(_chosen(record, captions)):
            yield f"{record.key} caption {number}", {"image": record.key, "caption": text}, [record.key]


def _questions(records: Sequence[NanoRecord]) -> Iterator[Made]:
    for record in records:
        for number, qa in enumerate(record.qa):
            question = NANO_TASKS.question(qa.question)
            fields = {"image": record.key, "question": question, "answer": qa.answer,
                      "messages": _exchange([{"image": record.key}, question], [qa.answer])}
            yield f"{record.key} question {number}", fields, [record.key]


def _descriptions(records: Sequence[NanoRecord]) -> Iterator[Made]:
    for record in records:
        asked = [{"image": record.key}, NANO_TASKS.describe]
        yield f"{record.key} description", {"messages": _exchange(asked, [record.captions[0]])}, [record.key]


def _drawings(records: Sequence[NanoRecord], captions: str) -> Iterator[Made]:
    for record in records:
        for number, text in enumerate(_chosen(record, captions)):
            answer = [NANO_TASKS.draw_response, {"image": record.key}]
            messages = _exchange([NANO_TASKS.draw_request(text)], answer)
            yield f"{record.key} drawing {number}", {"messages": messages}, [record.key]


def _edits(nano: NanoSet, split: str) -> Iterator[Made]:
    for number, edit in enumerate(nano.edits):
        if edit.split != split:
            continue
        answer = [NANO_TASKS.edit_response, {"image": edit.target}]
        fields = {"source_image": edit.source, "target_image": edit.target, "instruction": edit.instruction,
                  "messages": _exchange([{"image": edit.source}, edit.instruction], answer)}
        yield f"edit {number}", fields, [edit.source, edit.target]


def _conversations(nano: NanoSet, split: str) -> Iterator[Made]:
    for number, talk in enumerate(nano.conversations):
        if talk.split == split:
            yield f"conversation {number}", {"messages": talk.messages}, talk.keys


def _exchange(user: list[Any], assistant: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
