"""Lists of questions, captions and prompts as `Sample`s: any format of `data.formats`.

vqa         {"questions": [{image_id, question, question_id}]} (VQA v1 and v2, OK-VQA), and
            {"annotations": [{question_id, answers: [{answer}], answer_type, question_type}]}
vizwiz      [{image, question, answers: [{answer}], answer_type}]: the image's name is the id
gqa         {ID: {imageId, question, answer, types}}
coco        {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; NoCaps and
            Flickr30k too
karpathy    {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
questions   LAVIS's list: [{image, question, question_id, answer: text or list}]
captions    LAVIS's list: [{image, caption: text or list, image_id or img_id}]; to draw [{image,
            text}] or [{text}]
text        a .txt with one caption per line

They name a field differently: `annotations.yaml` has all names. Images are named by path or COCO
id, or are part of the record. Numbers are texts, true is "yes". A record that cannot be used is a
sample with a `problem`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from seed_multimodal.config import read_table
from seed_multimodal.data.formats.bad_records import RECORD_FAULTS, broken_note
from seed_multimodal.data.formats.contents import IMAGE_KEYS, check_text
from seed_multimodal.data.formats.images import RecordImage, find_image, record_image, text_member
from seed_multimodal.data.formats.record import (
    BadRecord,
    Record,
    RecordFields,
    as_list,
    shorten,
)
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.storage import read_all
from seed_multimodal.errors import DataError

Key = int | str
MAX_PATH = 4096  # longer texts are images as base64
Json = Any  # a value of a file, whose type is unknown
Model = TypeVar("Model", bound=BaseModel)
NAMES: dict[str, list[str]] = read_table(__file__)


@dataclass
class Sample:
    """A question about an image, or an image with its captions."""

    key: Key  # id in the results
    location: str  # in the file, for messages
    image: Key | None = None  # path or id in the file; None: a caption without image
    question: str = ""
    references: list[str] = field(default_factory=list)  # annotators' answers or captions
    answer_type: str = ""
    question_type: str = ""
    official: bool = False  # references of VQA's annotators, which are compared as they are
    problem: str = ""  # why it is unusable
    index: int = 0  # among all samples of a run
    made_from: str = field(default="", compare=False)  # see `Benchmark.made_from`; "": unknown yet
    split: str = ""  # of Karpathy's file
    # What it was read from; `is_content`: also the image, whose name then is `image`.
    record: Record | None = field(default=None, compare=False, repr=False)
    is_content: bool = False

    @property
    def caption(self) -> str:
        """The first caption, to generate from."""
        return next(text.strip() for text in self.references if text.strip())


# ---- records


def read_records(path: str | Path) -> list[Record]:
    """The unread records of files of any format, or the lines of a .txt.

    Raises DataError: no such file, or none that is read.
    """
    if Path(path).suffix == ".txt":
        content = read_all(path)
        check_text(path, content)
        lines = content.decode("utf-8-sig", "replace").split("\n")
        return [
            Record(f"line {number}", f"{path}: line {number}", {"image_id": number, "text": text})
            for number, text in enumerate(map(str.strip, lines), 1)
            if text
        ]
    records = open_records(path, joined=False)
    return [records.locate(index) for index in range(len(records))]


def read_items(path: str | Path) -> list[tuple[str, Json]]:
    """The fields of each record, with its location. Raises DataError: it is damaged, too."""
    return [(record.location, record.parsed().fields) for record in read_records(path)]


def parse_item(model: type[Model], location: str, item: Json) -> Model:
    """An item as an object of a pydantic class. Raises DataError: another layout."""
    try:
        return model.model_validate(item)
    except ValidationError as error:
        fault = error.errors()[0]
        names = ": ".join(map(str, fault["loc"]))
        raise DataError(f"{location}: {names}: {fault['msg']}.") from None


def read_sample(record: Record, needed: Sequence[str]) -> Sample:
    """The sample of a record; damaged, of another type or without one of `needed` it has a
    problem."""
    sample = Sample(record.key, record.location, record=record)
    try:
        _fill(sample, record.parsed(), needed)
    except RECORD_FAULTS as error:
        sample.problem = broken_note(error, record.location).location
    return sample


def _fill(sample: Sample, record: Record, needed: Sequence[str]) -> None:
    """Set the fields of a sample from a read record. Raises one of RECORD_FAULTS."""
    # 1. The image: GQA and Karpathy have parts of its path, VQA and COCO its id.
    fields = record.fields
    image = _value(fields, "image")
    is_member = not record.members.keys().isdisjoint(IMAGE_KEYS)
    is_long = isinstance(image, str) and len(image) > MAX_PATH
    if is_member or is_long or isinstance(image, bytes | Mapping):
        sample.is_content = True
        image = (isinstance(image, Mapping) and image.get("path")) or record.key
    elif "imageId" in fields:
        image = f"{image}.jpg"
    elif fields.get("filepath"):
        image = f"{fields['filepath']}/{image}"
    elif image is None and "text" not in fields:
        image = fields.get("image_id")
    sample.image = _key(image, "image")

    # 2. The key: of a question (VizWiz names it by its image), or of the image.
    is_vizwiz = str(image).startswith("VizWiz_")
    id_name = "question_id" if "question_id" in needed else "image_id"
    key = _key(_value(fields, id_name), id_name)
    if key is None and id_name == "image_id":
        key = _coco_id(sample.image)
    elif key is None and is_vizwiz:
        key = sample.image
    if key is not None:
        sample.key = key

    # 3. The texts; GQA has an object of types.
    types = fields.get("types") or {}
    if not isinstance(types, Mapping):
        raise BadRecord("wrong type", f"types: {shorten(types)} is no object.")
    for name in ("question", "answer_type", "question_type"):
        setattr(sample, name, _text(_value({**types, **fields}, name), name).strip())
    if "sentences" in fields:
        sample.split = str(fields.get("split"))

    # 4. What the annotators wrote: texts, or objects with one each.
    answers = _value(fields, "references")
    if answers is None:
        answers = text_member(record) or []
    references = as_list(answers)
    are_objects = all(isinstance(item, Mapping) for item in references)
    if are_objects:
        references = [item.get("answer", item.get("raw")) for item in references]
    if None in references:
        raise BadRecord("missing key", "references: one of them has no text.")
    texts = [_text(item, "references") for item in references]
    is_vqa = "question_id" in fields and "question" not in fields
    sample.official = bool(texts) and are_objects and (is_vqa or is_vizwiz)
    if not sample.official:  # an annotator's blank answer counts
        texts = [text for text in texts if text.strip()]
    sample.references = texts if "".join(texts).strip() else []

    # 5. What is missing.
    values = {**vars(sample), "question_id": key}
    missing = [name for name in needed if values[name] in (None, "", [])]
    if missing:
        raise BadRecord("missing key", f"has no {' and no '.join(missing)}.")


def _value(fields: RecordFields, name: str) -> Json:
    """The first value that is there under one of the names of a field, or None."""
    for key in NAMES[name]:
        if fields.get(key) not in (None, "", []):
            return fields[key]
    return None


def _key(value: Json, name: str) -> Key | None:
    """An id or path. Raises BadRecord: another type."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise BadRecord("wrong type", f"{name}: {shorten(value)} is neither a text nor a number.")
    return value


def _text(value: Json, name: str) -> str:
    """A text, also of a number, or of a truth value as answers have it; None: "".

    Raises BadRecord: another type.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_number = isinstance(value, int | float) and isfinite(value)
    text = str(_whole(value)) if is_number else value or ""
    # A list as a text is how pandas writes it into a .csv.
    if not isinstance(text, str) or re.match(r"\s*\[\s*(['\"\]]|-?[\d.]+\s*[],])", text):
        raise BadRecord("wrong type", f"{name}: {shorten(value)} is not a text.")
    return text


def _whole(value: Json) -> Json:
    """A whole number as such: tables with empty cells have floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _coco_id(image: Key | None) -> Key | None:
    """The number at the end of a COCO file name, used as key of results; else the name."""
    if not isinstance(image, str):
        return image
    match = re.fullmatch(r"(?:.*_)?0*(\d+)", Path(image).stem)
    return int(match[1]) if match else image


# ---- questions and captions


def read_questions(path: str | Path, annotations: str | Path | None = None) -> list[Sample]:
    """The questions of a file, with answers from `annotations` or the file itself (or none).

    Raises:
        DataError: no such file, unknown layout, duplicate question ids, or questions without
            annotation.
    """
    # 1. The questions, each once.
    samples = _samples(path, ("question", "image", "question_id"))
    check_ids(samples, path)

    # 2. Their answers; of a test set there are none at all.
    if annotations is not None:
        needed = ("references", "question_id")
        answers = [read_sample(record, needed) for record in read_records(annotations)]
        check_ids(answers, annotations)
        _annotate(samples, answers, path, annotations)
    elif any(sample.references for sample in samples):
        for sample in samples:
            if not (sample.references or sample.problem):
                sample.problem = f"{sample.location}: has no references, but others have."
    return samples


def read_captions(
    path: str | Path,
    split: str = "test",
    truth: str | Path | None = None,
    *,
    each_text: bool = False,
) -> list[Sample]:
    """The images and captions of a file.

    Args:
        split: split of Karpathy's file.
        truth: a file with the captions; then `path` may list only images.
        each_text: one sample per item, with or without image (texts to generate from); else
            captions are grouped by image.

    Raises:
        DataError: no such file, unknown layout, empty split, or images missing in `truth`.
    """
    # 1. A sample for each item; texts to draw need no image, and captions may be in `truth`.
    needed: tuple[str, ...] = ("image", "references")
    if truth is not None:
        needed = ("image",)
    elif each_text:
        needed = ("references",)
    samples = _samples(path, needed)

    # 2. Those of the split.
    splits = sorted({sample.split for sample in samples if sample.split})
    if splits:
        samples = [sample for sample in samples if sample.split in (split, "")]
        if split not in splits:
            raise DataError(
                f"{path}: has no image of the split {split!r}; there are {', '.join(splits)}."
            )

    # 3. Each text, or each image with all of its captions.
    if each_text:
        return _with_unique_keys(samples)
    samples = _grouped(samples)
    if truth is not None:
        _annotate(samples, read_captions(truth, split), path, truth)
    return samples


def _samples(path: str | Path, needed: Sequence[str]) -> list[Sample]:
    """The samples of a file; unusable ones have the keys of their records."""
    samples: list[Sample] = []
    for record in read_records(path):
        sample = read_sample(record, needed)
        samples.append(replace(sample, key=record.key) if sample.problem else sample)
    return samples


def check_ids(samples: Sequence[Sample], path: str | Path) -> None:
    """Raise DataError: a question is in a file twice; only one of its answers would count."""
    keys = sorted(str(sample.key) for sample in samples)
    for key, following in pairwise(keys):
        if key == following:
            raise DataError(
                f"{path}: several records have question_id {key}; the answers to a question are "
                "one list."
            )


def _with_unique_keys(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose keys were used before, or are missing, get their index as key."""
    used: set[Key] = set()
    for index, sample in enumerate(samples):
        if sample.key in used or sample.location.endswith(f": {sample.key}"):
            sample.key = f"item {index}"
        used.add(sample.key)
    return list(samples)


def _annotate(
    samples: Sequence[Sample], truth: Sequence[Sample], path: str | Path, truth_path: str | Path
) -> None:
    """Give samples of one file the references of another, by their keys as texts."""
    references = {str(sample.key): sample for sample in truth}
    usable = [sample for sample in samples if not sample.problem]
    missing = [sample.key for sample in usable if str(sample.key) not in references]
    problems = [sample.problem for sample in truth if sample.problem]
    if missing and not problems:
        raise DataError(
            f"{truth_path}: has nothing about {len(missing):,} of {len(samples):,} samples of "
            f"{path}, first {missing[0]}: they belong to different sets."
        )
    for sample in usable:
        reference = references.get(str(sample.key))
        if reference is None:
            sample.problem = f"{sample.location}: has no references in {truth_path} ({problems[0]})"
            continue
        sample.problem = reference.problem
        sample.references = reference.references
        sample.answer_type = reference.answer_type
        sample.question_type = reference.question_type
        sample.official = reference.official


def _grouped(samples: Iterable[Sample]) -> list[Sample]:
    """One sample per image.

    Images whose names end in the same number (a/1.jpg, b/1.jpg) are keyed by name.
    """
    by_key: dict[Key, Sample] = {}
    for sample in samples:
        # Another image with the same number.
        same_key = by_key.get(sample.key, sample)
        if sample.image is not None and sample.image != same_key.image:
            sample = replace(sample, key=sample.image)
        # The first sample of an image collects the captions of the others.
        group = by_key.setdefault(sample.key, sample)
        if group is not sample:
            group.references.extend(sample.references)
    return list(by_key.values())


# ---- images


def sample_image(sample: Sample, root: str | Path | None, file: str | Path) -> RecordImage:
    """The image of a sample: of its record, or named by path or COCO id.

    root: folder of the images; by default that of the record's, or the samples', `file`.

    Raises ImageError: not found; BadRecord: no image.
    """
    record = sample.record or Record("", sample.location, file=str(file))
    if sample.is_content:
        record = record.parsed()
        content: Json = record.member(*IMAGE_KEYS)
        return record_image(content or _value(record.fields, "image"), record, root)
    names = [str(sample.image)]
    if names[0].isdigit():
        names = [name.format(int(names[0])) for name in NAMES["coco_names"]]
    name = next((name for name in names if find_image(name, root, record.file)), names[0])
    return record_image(name, record, root)
