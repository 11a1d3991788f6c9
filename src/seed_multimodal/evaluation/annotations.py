"""Readers of benchmark annotation files, as `Sample`s.

VQA (v1, v2, OK-VQA)    {"questions": [{image_id, question, question_id}]}
                        {"annotations": [{question_id, answers: [{answer}], answer_type,
                        question_type}]}
VizWiz                  [{image, question, answers: [{answer}], answer_type}]: image name as id
GQA                     {ID: {imageId, question, answer, types}}
COCO captions           {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; NoCaps,
                        Flickr30k too
Karpathy's split        {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
lists, as LAVIS's       [{image, question, question_id, answer: text or list}], [{image, caption:
                        text or list, image_id or img_id}], [{image, text}] or [{text}] to draw;
                        also .jsonl
texts                   a .txt with one caption per line

Images are named by path or COCO id. An unusable item is a sample with a `problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import find_image
from seed_multimodal.data.formats.sources import nearest_path
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import DataError, ImageError, first_line

Key = int | str
Json = Any  # a value of a file, whose type is unknown
# File names of COCO ids; optionally in a folder named after the split.
_COCO_NAMES = (
    "COCO_val2014_{:012d}.jpg",
    "val2014/COCO_val2014_{:012d}.jpg",
    "COCO_test2015_{:012d}.jpg",
    "test2015/COCO_test2015_{:012d}.jpg",
    "COCO_train2014_{:012d}.jpg",
    "train2014/COCO_train2014_{:012d}.jpg",
    "{:012d}.jpg",
    "val2017/{:012d}.jpg",
    "train2017/{:012d}.jpg",
)


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
    problem: str = ""  # why it is unusable

    @property
    def caption(self) -> str:
        """The first caption, to generate from."""
        return next(text.strip() for text in self.references if text.strip())


def read_questions(path: str | Path, annotations: str | Path | None = None) -> list[Sample]:
    """The questions of a file, with answers from `annotations` or the file itself (or none).

    Raises:
        DataError: no such file, unknown layout, duplicate question ids, or questions without
            annotation.
    """
    # 1. The questions, each once.
    items = read_items(path, "questions")
    samples = _samples(items, ("question", "image"), is_question=True)
    keys = {sample.key for sample in samples}
    if len(keys) < len(samples):
        raise DataError(f"{path}: several questions have one question_id.")
    if annotations is None:
        return samples

    # 2. Their answers.
    items = read_items(annotations, "annotations")
    answers = _samples(items, ("references",), is_question=True)
    return _annotated(samples, answers, path, annotations)


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
    content = _load(path)
    if Path(path).suffix == ".txt":
        return _caption_lines(content, path)

    # 1. The items: Karpathy's file lists images with their captions, others captions of images.
    images: list[JsonObject] = []
    if isinstance(content, dict):
        images = content.get("images") or []
    if any("sentences" in image for image in images):
        items = _items_of_split(images, path, split)
    else:
        items = _items(content, path, "annotations")

    # 2. A sample for each; texts to draw need no image, and captions may be in the other file.
    needed: tuple[str, ...] = ("image", "references")
    if truth is not None:
        needed = ("image",)
    elif each_text:
        needed = ("references",)
    samples = _samples(items, needed)
    samples = _with_unique_keys(samples) if each_text else _grouped(samples)

    # 3. Images have the names of their files.
    files = {image.get("id"): image["file_name"] for image in images if "file_name" in image}
    for sample in samples:
        sample.image = files.get(sample.image, sample.image)
    if truth is None or each_text:
        return samples
    return _annotated(samples, read_captions(truth, split), path, truth)


def _caption_lines(lines: Sequence[str], path: str | Path) -> list[Sample]:
    """The captions of a text file, one a line."""
    samples: list[Sample] = []
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{path}: line {line_number}"
            samples.append(Sample(line_number, location, references=[line.strip()]))
    return samples


def _items_of_split(
    images: Sequence[JsonObject], path: str | Path, split: str
) -> list[tuple[str, Json]]:
    """The items of a split of Karpathy's file. Raises DataError: none."""
    items: list[tuple[str, Json]] = []
    for location, image in _items(images, path, "images"):
        if image.get("split") == split:
            items.append((location, image))
    if not items:
        splits = ", ".join(sorted({str(image.get("split")) for image in images}))
        raise DataError(f"{path}: has no image of the split {split!r}; there are {splits}.")
    return items


def _with_unique_keys(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose keys were used before, or are missing, get their index as key."""
    # The first sample of a key keeps it.
    first_index: dict[Key, int] = {}
    unique: list[Sample] = []
    for index, sample in enumerate(samples):
        if sample.key is None or first_index.setdefault(sample.key, index) != index:
            sample = replace(sample, key=f"item {index}")
        unique.append(sample)
    return unique


def _annotated(
    samples: Sequence[Sample], truth: Sequence[Sample], path: str | Path, truth_path: str | Path
) -> list[Sample]:
    """Samples of one file with the references of another."""
    references = {sample.key: sample for sample in truth if not sample.problem}
    annotated: list[Sample] = []
    missing: list[Key] = []
    for sample in samples:
        reference = references.get(sample.key)
        if sample.problem:
            annotated.append(sample)
        elif reference is None:
            missing.append(sample.key)
        else:
            # All fields of the truth, but the image and the question of the sample.
            merged = replace(
                reference, location=sample.location, image=sample.image, question=sample.question
            )
            annotated.append(merged)
    if missing:
        raise DataError(
            f"{truth_path}: has nothing about {len(missing):,} of {len(samples):,} samples of "
            f"{path}, first {missing[0]}: they belong to different sets."
        )
    return annotated


def _samples(
    items: Iterable[tuple[str, Json]], needed: Sequence[str], is_question: bool = False
) -> list[Sample]:
    """A sample for each item with its location; see `_sample`."""
    return [_sample(location, item, needed, is_question) for location, item in items]


def _sample(location: str, item: Json, needed: Sequence[str], is_question: bool) -> Sample:
    """A sample from an item in any layout, with a problem if `needed` fields are missing.

    is_question: the key is the question's, not the image's.
    """
    if not isinstance(item, dict):
        item = {}

    # 1. The image; GQA and Karpathy name it by parts of its path.
    image = _first(item, "image", "file_name", "image_id")
    if "imageId" in item:
        image = f"{item['imageId']}.jpg"
    elif "filename" in item:
        image = "/".join(filter(None, (item.get("filepath"), item["filename"])))

    # 2. The key of the results: an id of the file, VizWiz's image name, or the number in a name.
    key = _first(item, "image_id", "img_id", "cocoid", "imgid")
    if is_question:
        vizwiz_key = image if str(image).startswith("VizWiz_") else None
        key = item.get("question_id", vizwiz_key)
    elif key is None:
        key = _coco_id(image)

    # 3. The texts, and the types; GQA has an object of them.
    texts = _first(item, "answers", "answer", "captions", "caption", "text", "sentences")
    types = {**(item.get("types") or {}), **item}
    sample = Sample(
        key,
        location,
        image,
        question=_text(item, "question"),
        references=_texts(texts),
        answer_type=_text(types, "answer_type", "structural"),
        question_type=_text(types, "question_type", "semantic"),
    )

    # 4. What is missing.
    missing = [name for name in needed if getattr(sample, name) in (None, "", [])]
    if is_question and key is None:
        missing.append("question_id")
    if missing:
        problem = f"{location}: has no {' and no '.join(missing)}."
        return replace(sample, key=location.rpartition(": ")[2], problem=problem)
    return sample


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


def read_items(path: str | Path, key: str) -> list[tuple[str, Json]]:
    """The items of a JSON file (a list, or the list under `key`) or of lines, with their location.

    Raises DataError: no such file, no JSON, no list.
    """
    return _items(_load(path), path, key)


def _load(path: str | Path) -> Json:
    """A file's JSON; for .txt and .jsonl a list of its lines."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{nearest_path(path)}.")
    # Files of Windows programs may begin with a byte order mark.
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return text.split("\n")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line]
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is not json ({first_line(error)}).") from None


def _items(content: Json, path: str | Path, key: str) -> list[tuple[str, Json]]:
    """The items of a list, of the list under `key`, or of GQA's object, with their location."""
    items = content
    if isinstance(content, dict):
        items = content.get(key)
        first_value = next(iter(content.values()), None)
        if isinstance(first_value, dict) and "imageId" in first_value:
            # GQA's object has the question ids as keys.
            items = [{**item, "question_id": id} for id, item in content.items()]
    if not isinstance(items, list) or not items:
        raise DataError(f"{path}: holds no json list, by itself or under {key!r}.")
    return [(f"{path}: item {index}", item) for index, item in enumerate(items)]


def _first(item: JsonObject, *names: str) -> Json:
    """The first of these values that is there, or None."""
    for name in names:
        if item.get(name) not in (None, ""):
            return item[name]
    return None


def _text(item: JsonObject, *names: str) -> str:
    """The first of these values that is there, as a text."""
    return str(_first(item, *names) or "").strip()


def _texts(value: Json) -> list[str]:
    """The texts of a string, a list of strings, or of objects with one each; else an empty list."""
    texts: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):  # an annotator's answer, or a caption of Karpathy's file
            item = item.get("answer", item.get("raw"))
        if not isinstance(item, str):
            return []
        texts.append(item)
    return texts if "".join(texts).strip() else []


def _coco_id(image: Json) -> Json:
    """The number at the end of a COCO file name, used as key of results; else the name."""
    if not isinstance(image, str):
        return image
    match = re.fullmatch(r"(?:.*_)?0*(\d+)", Path(image).stem)
    return int(match[1]) if match else image


def find_image_file(image: int | str, root: Path | None, annotations: Path, location: str) -> Path:
    """The file of an image named by path or COCO id.

    Raises:
        ImageError: not found, with the first path tried.
    """
    names = [name.format(image) for name in _COCO_NAMES] if isinstance(image, int) else [image]
    for name in names:
        file = find_image(name, root, annotations)
        if file:
            return file
    folder = root or annotations.parent
    raise ImageError(f"{location}: its image was not found: {folder}/{names[0][:200]}.")
