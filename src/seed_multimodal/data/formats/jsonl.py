"""Records of .jsonl, .json and .csv files: lines are read by offset, lists are in memory."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.bad_records import VALUE_ERRORS, unusable_value
from seed_multimodal.data.formats.contents import BOM, QUESTIONS, check_text
from seed_multimodal.data.formats.index import Arrays, IndexedFile
from seed_multimodal.data.formats.record import BadRecord, FieldValue, JsonObject, Record
from seed_multimodal.data.formats.storage import FileReader, open_binary, read_all
from seed_multimodal.errors import DataError, first_line

# Keys of the lists in official files: COCO's and VQA's, prompts, Karpathy's; what a record has of
# the last two is its own.
LISTS = ("annotations", "questions", "prompts", "images")
OWN = {"prompts", "images"}


class JsonLines(IndexedFile):
    """The lines of a .jsonl by index; blank lines are skipped."""

    kind = "jsonl"

    def scan(self) -> Arrays:
        """Offset, length and line number (from 1) of each record, int64 [N, 3]."""
        # An array of C integers: a file may have millions of lines.
        lines = array("q")
        position = 0
        with open_binary(self.path) as file:
            head = file.read(512)
            check_text(self.path, head)
            if head.removeprefix(BOM).lstrip().startswith(b"["):
                raise DataError(f"{self.path}: is one JSON list; rename it to .json.")
            file.seek(0)
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    lines.extend((position, len(line), line_number))
                position += len(line)
        return {"lines": np.array(lines).reshape(-1, 3)}

    @staticmethod
    def count_indexed(arrays: Arrays) -> int:
        """Number of records."""
        return len(arrays["lines"])

    def locate(self, row: int) -> Record:
        """An unread record."""
        start, length, line_number = self.arrays["lines"][row].tolist()
        key = f"line {line_number}"
        line = partial(self.file.read, start, length)
        return Record(key, f"{self.path}: {key}", {}, {"json": line}, self.path)


class JsonList(FileReader):
    """The items of a .json list, or an object per line, by index.

    They are one buffer, which forked workers share.
    """

    @cached_property
    def _items(self) -> tuple[bytes, np.ndarray]:
        """The encoded items, and their offsets, int64 [N + 1]."""
        content = read_all(self.path)
        check_text(self.path, content[:512])
        items = self._encoded_items(content.removeprefix(BOM))
        offsets = np.array([0, *accumulate(map(len, items))], np.int64)
        return b"".join(items), offsets

    def _encoded_items(self, content: bytes) -> list[bytes]:
        """Each item as JSON. Raises BadRecord."""
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            # A second object after the first one: an object per line.
            if getattr(error, "msg", "") == "Extra data" and content.lstrip().startswith(b"{"):
                return [line for line in content.splitlines() if line.strip()]
            raise BadRecord(
                "malformed json", f"{self.path}: is not JSON ({first_line(error)})."
            ) from None

        if isinstance(value, dict):
            # An official file, or a file of one line.
            one_line = b"\n" not in content.strip()
            official = self._official(value)
            value = [value] * one_line if official is None else official
        if not isinstance(value, list) or (not value and content.lstrip().startswith(b"{")):
            raise BadRecord(
                "malformed json",
                f"{self.path}: must have a list of records, or one object per line.",
            )
        return [json.dumps(item).encode() for item in value]

    def _official(self, content: JsonObject) -> list[FieldValue] | None:
        """The records of an official file, with the fields of their images and questions."""
        # 1. Objects by their id (GQA), or the list under a key.
        first = next(iter(content.values()), None)
        if isinstance(first, dict) and "imageId" in first:
            return [{**item, "question_id": id} for id, item in content.items()]
        key = next((key for key in LISTS if isinstance(content.get(key), list)), "")
        items: list[FieldValue] = content.get(key, [])
        first = next(iter(items), {})
        names = {*first} if isinstance(first, dict) else set()
        # A record may have images, or prompts, of its own.
        if not key or (key in OWN and not {"file_name", "filename", "prompt"} & names):
            return None
        if key == "questions" and self.file.joined:
            raise DataError(
                f"{self.path}: has questions without answers; give the file of their annotations."
            )

        # 2. What an annotation is about.
        try:
            if key == "annotations":
                _add_images(items, content.get("images", ()))
                if self.file.joined and "question_id" in names and "question" not in names:
                    self._add_questions(items, content["data_subtype"])
        except VALUE_ERRORS as error:
            raise unusable_value(error, self.path) from error
        return items

    def _add_questions(self, items: list[JsonObject], subset: str) -> None:
        """Add VQA's question, commonest answer and image to each annotation.

        Raises DataError: the folder does not have the file of questions.
        """
        pattern = f"*{subset}{QUESTIONS}"
        files = sorted(Path(self.path).parent.glob(pattern))
        if len(files) != 1:
            raise DataError(
                f"{self.path}: has answers without questions; its folder needs one {pattern}, but "
                f"has {len(files)}."
            )
        entries = json.loads(read_all(files[0]))["questions"]
        questions = {str(entry["question_id"]): entry["question"] for entry in entries}
        for item in items:
            answers = Counter(answer["answer"] for answer in item["answers"])
            item["question"] = questions[str(item["question_id"])]
            item["answer"] = item.get("multiple_choice_answer") or answers.most_common(1)[0][0]
            item["image"] = f"COCO_{subset}_{item['image_id']:012d}.jpg"

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        _, offsets = self._items
        return [len(offsets) - 1]

    def locate(self, row: int) -> Record:
        """A record."""
        data, offsets = self._items
        key = f"item {row}"
        item = data[offsets[row] : offsets[row + 1]]
        return Record(key, f"{self.path}: {key}", {}, {"json": item}, self.path)


def _add_images(items: list[JsonObject], images: Sequence[JsonObject]) -> None:
    """Add file and size of COCO's images to their annotations."""
    by_id = {str(image["id"]): image for image in images}
    columns = ("file_name", "width", "height")
    for item in filter(lambda item: isinstance(item, dict), items):
        image = by_id.get(str(item.get("image_id")), {})
        item.update({key: image[key] for key in columns if key in image})


class CsvTable(JsonList):
    """The rows of a .csv with a header, by index."""

    def _encoded_items(self, content: bytes) -> list[bytes]:
        """Each row as JSON.

        Raises DataError: not UTF-8, two columns of one name, or more cells in a row than columns.
        """
        csv.field_size_limit(2**31 - 1)  # a cell may be an image as base64
        items: list[bytes] = []
        try:
            rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
            names = [*filter(None, rows.fieldnames or ())]
            if len({*names}) < len(names):
                raise DataError(f"{self.path}: two of its columns have one name ({names}).")
            for row in rows:
                if None in row:  # cells beyond the header
                    raise DataError(
                        f"{self.path}: line {rows.line_num} has more cells than the header; put "
                        "texts with commas in quotes."
                    )
                items.append(json.dumps(row).encode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: is not UTF-8 ({error.reason}); convert it once, for example: "
                "iconv -f WINDOWS-1252 -t UTF-8."
            ) from None
        return items
