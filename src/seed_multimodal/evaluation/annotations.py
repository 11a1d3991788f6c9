"""Readers of benchmark annotation files, as `Sample`s.

vqa         {"questions": [{image_id, question, question_id}]} (VQA v1 and v2, OK-VQA), and
            {"annotations": [{question_id, answers: [{answer}], answer_type, question_type}]}
vizwiz      [{image, question, answers: [{answer}], answer_type}]: the image's name is the id
gqa         {ID: {imageId, question, answer, types}}
coco        {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; NoCaps and
            Flickr30k too
karpathy    {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
questions   LAVIS's list: [{image, question, question_id, answer: text or list}]; also .jsonl
captions    LAVIS's list: [{image, caption: text or list, image_id or img_id}]; to draw [{image,
            text}] or [{text}]; also .jsonl
text        a .txt with one caption per line

The formats name a field differently: `read_sample` knows all names. Images are named by path or
COCO id. An unusable item is a sample with a `problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from seed_multimodal.data.formats.contents import nearest_path
from seed_multimodal.data.formats.image_paths import find_image
from seed_multimodal.data.formats.record import as_list
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import DataError, ImageError, first_line

Key = int | str
Json = Any  # a value of a file, whose type is unknown
Model = TypeVar("Model", bound=BaseModel)
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
    index: int = 0  # among all samples of a run

    @property
    def caption(self) -> str:
        """The first caption, to generate from."""
        return next(text.strip() for text in self.references if text.strip())


# ---- items


def read_sample(location: str, item: Json, needed: Sequence[str]) -> Sample:
    """The sample of an item; without one of the `needed` fields it has a problem."""
    if not isinstance(item, dict):
        item = {}

    # 1. The image: GQA and Karpathy have parts of its path, VQA and COCO its id.
    image = _first(item, "image", "file_name", "filename", "imageId")
    if "imageId" in item:
        image = f"{image}.jpg"
    elif item.get("filepath"):
        image = f"{item['filepath']}/{image}"
    elif image is None and "text" not in item:
        image = item.get("image_id")

    # 2. The key: of a question (VizWiz names it by its image), or of the image.
    if "question_id" in needed:
        key = _first(item, "question_id")
        if key is None and str(image).startswith("VizWiz_"):
            key = image
    else:
        key = _first(item, "cocoid", "image_id", "img_id", "imgid")
        if key is None:
            key = _coco_id(image)

    # 3. The texts; GQA has an object of types.
    types = {**(item.get("types") or {}), **item}
    references = _first(item, "answers", "answer", "captions", "caption", "sentences", "text")
    sample = Sample(
        key,
        location,
        image,
        question=_text(item, "question"),
        references=_texts(references),
        answer_type=_text(types, "answer_type", "structural"),
        question_type=_text(types, "question_type", "semantic"),
    )

    # 4. What is missing.
    values = {**vars(sample), "question_id": key}
    missing = [name for name in needed if values[name] in (None, "", [])]
    if missing:
        problem = f"{location}: has no {' and no '.join(missing)}."
        return replace(sample, key=location.rpartition(": ")[2], problem=problem)
    return sample


def _samples(items: Iterable[tuple[str, Json]], needed: Sequence[str]) -> list[Sample]:
    return [read_sample(location, item, needed) for location, item in items]


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
    for item in as_list(value):
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


# ---- questions and captions


def read_questions(path: str | Path, annotations: str | Path | None = None) -> list[Sample]:
    """The questions of a file, with answers from `annotations` or the file itself (or none).

    Raises:
        DataError: no such file, unknown layout, duplicate question ids, or questions without
            annotation.
    """
    # 1. The questions, each once.
    samples = _samples(read_items(path, "questions"), ("question", "image", "question_id"))
    keys = {sample.key for sample in samples}
    if len(keys) < len(samples):
        raise DataError(f"{path}: several questions have one question_id.")
    if annotations is None:
        return samples

    # 2. Their answers.
    answers = _samples(read_items(annotations, "annotations"), ("references", "question_id"))
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
    # 1. The items: Karpathy's file lists images with their captions, others captions of images.
    content = _load(path)
    images: list[JsonObject] = []
    if isinstance(content, dict):
        images = content.get("images") or []
    if any("sentences" in image for image in images):
        items = _items(images, path, "images")
        items = [(location, image) for location, image in items if image.get("split") == split]
        if not items:
            splits = ", ".join(sorted({str(image.get("split")) for image in images}))
            raise DataError(f"{path}: has no image of the split {split!r}; there are {splits}.")
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


def _with_unique_keys(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose keys were used before, or are missing, get their index as key."""
    used: set[Key | None] = {None}
    for index, sample in enumerate(samples):
        if sample.key in used:
            sample.key = f"item {index}"
        used.add(sample.key)
    return list(samples)


def _annotated(
    samples: Sequence[Sample], truth: Sequence[Sample], path: str | Path, truth_path: str | Path
) -> list[Sample]:
    """Samples of one file with the references of another."""
    references = {sample.key: sample for sample in truth if not sample.problem}
    usable = [sample for sample in samples if not sample.problem]
    missing = [sample.key for sample in usable if sample.key not in references]
    if missing:
        raise DataError(
            f"{truth_path}: has nothing about {len(missing):,} of {len(samples):,} samples of "
            f"{path}, first {missing[0]}: they belong to different sets."
        )
    for sample in usable:
        reference = references[sample.key]
        sample.references = reference.references
        sample.answer_type = reference.answer_type
        sample.question_type = reference.question_type
    return list(samples)


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


# ---- files


def parse_item(model: type[Model], location: str, item: Json) -> Model:
    """An item as an object of a pydantic class. Raises DataError: another layout."""
    try:
        return model.model_validate(item)
    except ValidationError as error:
        fault = error.errors()[0]
        names = ": ".join(map(str, fault["loc"]))
        raise DataError(f"{location}: {names}: {fault['msg']}.") from None


def read_items(path: str | Path, key: str) -> list[tuple[str, Json]]:
    """The items of a JSON file (a list, or the list under `key`) or of lines, with their location.

    Raises DataError: no such file, no JSON, no list.
    """
    return _items(_load(path), path, key)


def _load(path: str | Path) -> Json:
    """A file's JSON; for .jsonl a list of its lines, for .txt captions with numbers of lines."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{nearest_path(path)}.")
    # Files of Windows programs may begin with a byte order mark.
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            lines = enumerate(text.split("\n"), 1)
            return [
                {"image_id": number, "text": line.strip()} for number, line in lines if line.strip()
            ]
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
