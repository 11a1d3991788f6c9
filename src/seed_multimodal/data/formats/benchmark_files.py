"""Questions and annotations in the files that benchmarks publish, read item by item; captions: `caption_files`.

    VQA (v1, v2, OK-VQA)    {"questions": [{image_id, question, question_id}]}
                            {"annotations": [{question_id, answers: [{answer}], answer_type, question_type}]}
    VizWiz                  [{image, question, answers: [{answer}], answer_type}]: the picture's name is the id
    GQA                     {ID: {imageId, question, answer, types}}
    lists, as LAVIS's       [{image, question, question_id, answer: text or list}]; also .jsonl and .parquet, with
                            pictures inside them

A file of another layout is refused. An item that cannot be used is one bad sample, under its place (`item 3`) where it
has no name of its own; reading it raises BadRecord. Pictures are looked up, but not opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from seed_multimodal.data.formats.files import nearest_path
from seed_multimodal.data.formats.json_lines import JsonFile
from seed_multimodal.data.formats.pictures import HeldPicture, is_base64
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.records import FileRecords, open_file
from seed_multimodal.errors import DataError, first_line

LISTS = (".jsonl", ".parquet")
PICTURE_NAMES = ("image", "file_name", "image_id")
_HEAD = 1 << 16  # bytes in which GQA's file shows what it is
T = TypeVar("T")


@dataclass
class Question:
    """A question about a picture; `name` is its place in the file, `picture` what names the picture there."""

    key: int | str
    name: str
    text: str
    picture: int | str | HeldPicture


@dataclass
class Annotation:
    """What the annotators answered, and how the official files class the question."""

    answers: list[str]
    answer_type: str = ""
    question_type: str = ""


class Items:
    """The items of a json list, by itself or under `key`, or of a .jsonl or .parquet, by number."""

    def __init__(self, path: str | Path, key: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is no file of records" if self.path.exists() else f"there is no such file{nearest_path(path)}"
            raise DataError(f"{path}: {what}.")
        kind = self.path.suffix.lower()
        self._records = FileRecords([open_file(self.path, kind[1:]) if kind in LISTS else JsonFile(self.path, key=key)])

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        """The item, and `FILE: item N`; raises BadRecord for what is no object."""
        record, files = self._records.locate(row), self._records.open_files
        item = record.parsed(files).fields
        image = item.get("image")
        if isinstance(image, bytes | Mapping) or is_base64(image):  # not kept in memory
            name = image.get("path") if isinstance(image, Mapping) else None
            item["image"] = HeldPicture(record, files, str(name or record.where.removeprefix(f"{self.path}: ")))
        return item, record.where

    def usable(self, take: Callable[[dict[str, Any], str], T]) -> Iterator[tuple[str, T | BadRecord]]:
        """`item N` and what `take` makes of each item, or why it cannot be used."""
        for row in range(len(self)):
            try:
                yield f"item {row}", take(*self.read(row))
            except BadRecord as error:
                yield f"item {row}", error


class GqaItems(Items):
    """The questions of GQA's own file, an object with an object for each; it is in memory as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._items = list(json.loads(path.read_text(encoding="utf-8-sig")).items())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read as GQA's questions ({first_line(error)}).") from None

    def __len__(self) -> int:
        return len(self._items)

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        """The item with `question_id`, `image` and types as VQA's files name them."""
        key, item = self._items[row]
        where = f"{self.path}: item {row}"
        if not isinstance(item, dict):
            raise BadRecord("wrong type", f"{where}: holds a {type(item).__name__}, not an object.")
        given = item.get("types")
        kinds = given if isinstance(given, dict) else {}
        image = {"image": f"{item['imageId']}.jpg"} if item.get("imageId") else {}
        return {**item, **image, "question_id": key, "answer_type": kinds.get("structural") or "",
                "question_type": kinds.get("semantic") or ""}, where


def _question_items(path: str | Path, key: str) -> Items:
    file = Path(path)
    if file.is_file() and file.suffix.lower() not in LISTS:
        with open(file, "rb") as opened:
            start = opened.read(_HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"{") and b'"imageId"' in start:
            return GqaItems(file)
    return Items(path, key)


class Questions:
    """The questions of a file, read when they are asked for.

    Raises:
        DataError: no file of questions.
    """

    def __init__(self, path: str | Path) -> None:
        self.items = _question_items(path, "questions")
        self.rows, self.problems = _rows_by_id(self.items)
        self.keys = list(self.rows)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, number: int) -> Question:
        """Raises BadRecord: no question, no picture is named, no `question_id`, or that of an earlier one."""
        if self.keys[number] in self.problems:
            raise self.problems[self.keys[number]]
        item, where = self.items.read(self.rows[self.keys[number]])
        return Question(self.keys[number], where, text_of(item, "question", where), picture_of(item, where))


class Annotations:
    """The annotators' answers by `question_id`.

    Raises:
        DataError: as `Questions`.
    """

    def __init__(self, path: str | Path) -> None:
        self.items = _question_items(path, "annotations")
        self.rows, _ = _rows_by_id(self.items)

    def require(self, questions: Questions, limit: int | None = None) -> None:
        """Raises DataError unless the (first) questions are annotated, those apart that cannot be used."""
        keys = [key for key in questions.keys[:limit] if key not in questions.problems]
        missing = [key for key in keys if key not in self.rows]
        if missing:
            raise DataError(f"{self.items.path}: {len(missing):,} of {len(keys):,} questions are not annotated in it, "
                            f"first question_id {missing[0]}: questions and annotations belong to different sets.")
        for key in keys:
            self.read(key)

    def read(self, key: int | str) -> Annotation:
        """Raises BadRecord: no answers."""
        item, where = self.items.read(self.rows[key])
        answers = texts_of(item.get("answers", item.get("answer")), "answer")
        if not answers:
            raise BadRecord("missing key", f"{where}: has no answers (a list of texts, or of objects with 'answer').")
        return Annotation(answers, *(str(item.get(name) or "") for name in ("answer_type", "question_type")))


def _rows_by_id(items: Items) -> tuple[dict[int | str, int], dict[int | str, BadRecord]]:
    """Id → row; and why rows cannot be used, which stand under their places."""
    rows: dict[int | str, int] = {}
    problems: dict[int | str, BadRecord] = {}
    for row, (place, key) in enumerate(items.usable(_question_key)):
        if not isinstance(key, BadRecord) and key in rows:
            key = BadRecord("duplicate id", f"{items.path}: {place}: has the question_id {key} of item {rows[key]}.")
        if isinstance(key, BadRecord):
            problems[place] = key
        rows[place if isinstance(key, BadRecord) else key] = row
    return rows, problems


def _question_key(item: Mapping[str, Any], where: str) -> int | str:
    """The `question_id`; of VizWiz's items, each with a picture of its own, the picture's name."""
    own = item.get("question_id") is None and names_vizwiz(item.get("image"))
    return key_of(item, "image" if own else "question_id", where)


def names_vizwiz(value: Any) -> bool:
    """Whether a value is the name of one of VizWiz's pictures."""
    return isinstance(value, str) and value.startswith("VizWiz_")


def key_of(item: Mapping[str, Any], name: str, where: str) -> int | str:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadRecord("missing key", f"{where}: has no {name} that is a number or a text.")
    return value


def texts_of(given: Any, name: str) -> list[str]:
    """A text, a list of texts, or of objects that hold one under `name`; an empty list for anything else."""
    several = given if isinstance(given, list) else [given]
    texts: list[Any] = [one.get(name) if isinstance(one, Mapping) else one for one in several]
    return texts if all(isinstance(one, str) for one in texts) else []


def text_of(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("missing key", f"{where}: has no {name}.")
    return value.strip()


def picture_of(item: Mapping[str, Any], where: str) -> int | str | HeldPicture:
    value = next((item[name] for name in PICTURE_NAMES if item.get(name) not in (None, "")), None)
    if isinstance(value, bool) or not isinstance(value, int | str | HeldPicture):
        raise BadRecord("missing key", f"{where}: names no picture (image, file_name or image_id).")
    return value
