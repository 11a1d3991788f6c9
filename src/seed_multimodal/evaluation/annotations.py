"""Readers of benchmark annotation files, as `Sample`s.

    VQA (v1, v2, OK-VQA)    {"questions": [{image_id, question, question_id}]}
                            {"annotations": [{question_id, answers: [{answer}], answer_type, question_type}]}
    VizWiz                  [{image, question, answers: [{answer}], answer_type}]: image name as id
    GQA                     {ID: {imageId, question, answer, types}}
    COCO captions           {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; NoCaps, Flickr30k too
    Karpathy's split        {"images": [{filepath, filename, cocoid, split, sentences: [{raw}]}]}
    lists, as LAVIS's       [{image, question, question_id, answer: text or list}], [{image, caption: text or list,
                            image_id or img_id}], [{image, text}] or [{text}] to draw; also .jsonl
    texts                   a .txt with one caption per line

Images are named by path or COCO id. An unusable item is a sample with a `problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import find_image
from seed_multimodal.data.formats.sources import nearest_path
from seed_multimodal.errors import DataError, ImageError, first_line

Key = int | str
# File names of COCO ids ({}); optionally in a folder named after the split.
_COCO_NAMES = [
    name
    for split in ("val2014", "test2015", "train2014")
    for name in (f"COCO_{split}_{{:012d}}.jpg", f"{split}/COCO_{split}_{{:012d}}.jpg")
]
_COCO_NAMES += ["{:012d}.jpg", "val2017/{:012d}.jpg", "train2017/{:012d}.jpg"]


@dataclass
class Sample:
    """A question about an image, or an image with its captions."""

    key: Key  # id in the results
    where: str  # place in the file
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
        DataError: no such file, unknown layout, duplicate question ids, or questions without annotation.
    """
    samples = [
        _sample(*one, ("question", "image"), asked=True)
        for one in _items(_load(path), path, "questions")
    ]
    keys = [one.key for one in samples]
    if len(set(keys)) < len(keys):
        raise DataError(f"{path}: several questions have one question_id.")
    if annotations is None:
        return samples
    items = _items(_load(annotations), annotations, "annotations")
    return _annotated(
        samples, [_sample(*one, ("references",), asked=True) for one in items], path, annotations
    )


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
        each_text: one sample per item, with or without image (texts to generate from); else captions are grouped by
            image.

    Raises:
        DataError: no such file, unknown layout, empty split, or images missing in `truth`.
    """
    content = _load(path)
    if Path(path).suffix == ".txt":
        return [
            Sample(number, f"{path}: line {number}", references=[line.strip()])
            for number, line in enumerate(content, 1)
            if line.strip()
        ]
    images = content.get("images") or [] if isinstance(content, dict) else []
    karpathy = any("sentences" in one for one in images)
    items = _items(content, path, "images" if karpathy else "annotations")
    if karpathy:
        items = [(where, item) for where, item in items if item.get("split") == split]
        if not items:
            splits = ", ".join(sorted({str(one.get("split")) for one in images}))
            raise DataError(f"{path}: has no image of the split {split!r}; there are {splits}.")
    needed = (
        ("image",)
        if truth is not None
        else ("references",)
        if each_text
        else ("image", "references")
    )
    samples = [_sample(*one, needed) for one in items]
    if each_text:
        first = {one.key: number for number, one in reversed(list(enumerate(samples)))}
        return [
            one
            if one.key is not None and first[one.key] == number
            else replace(one, key=f"item {number}")
            for number, one in enumerate(samples)
        ]
    files = {one.get("id"): one["file_name"] for one in images if "file_name" in one}
    samples = [replace(one, image=files.get(one.image, one.image)) for one in _grouped(samples)]
    return samples if truth is None else _annotated(samples, read_captions(truth), path, truth)


def _annotated(
    samples: Sequence[Sample], truth: Sequence[Sample], path: str | Path, file: str | Path
) -> list[Sample]:
    """Samples of one file with the references of another."""
    known = {one.key: one for one in truth if not one.problem}
    missing = [one.key for one in samples if not one.problem and one.key not in known]
    if missing:
        raise DataError(
            f"{file}: has nothing about {len(missing):,} of {len(samples):,} samples of {path}, first "
            f"{missing[0]}: they belong to different sets."
        )
    return [
        one
        if one.problem
        else replace(known[one.key], where=one.where, image=one.image, question=one.question)
        for one in samples
    ]


def _sample(where: str, item: Any, needed: Sequence[str], asked: bool = False) -> Sample:
    """A sample from an item in any layout, with a problem if `needed` fields are missing. `asked`: use the question's
    key, not the image's."""
    item = item if isinstance(item, dict) else {}
    image: Any = _first(item, "image", "file_name", "image_id")
    if "imageId" in item:  # GQA
        image = f"{item['imageId']}.jpg"
    elif "filename" in item:  # Karpathy
        image = "/".join(filter(None, (item.get("filepath"), item["filename"])))
    types, key = item.get("types") or {}, _first(item, "image_id", "img_id", "cocoid", "imgid")
    if asked:
        key = item.get("question_id", image if str(image).startswith("VizWiz_") else None)
    elif key is None:
        key = _coco_number(image)
    sample = Sample(
        key,
        where,
        image,
        str(item.get("question") or "").strip(),
        _texts(_first(item, "answers", "answer", "captions", "caption", "text", "sentences")),
        str(item.get("answer_type") or types.get("structural") or ""),
        str(item.get("question_type") or types.get("semantic") or ""),
    )
    missing = [name for name in needed if getattr(sample, name) in (None, "", [])]
    missing += ["question_id"] if asked and key is None else []
    return (
        replace(
            sample,
            key=where.rpartition(": ")[2],
            problem=f"{where}: has no {' and no '.join(missing)}.",
        )
        if missing
        else sample
    )


def _grouped(samples: Iterable[Sample]) -> list[Sample]:
    """One sample per image. Images whose names end in the same number (a/1.jpg, b/1.jpg) are keyed by name."""
    found: dict[Key, Sample] = {}
    for one in samples:
        if one.image is not None and one.key in found and found[one.key].image != one.image:
            one = replace(one, key=one.image)
        if one.key in found:
            found[one.key].references.extend(one.references)
        else:
            found[one.key] = one
    return list(found.values())


def _load(path: str | Path) -> Any:
    """A file's JSON; for .txt and .jsonl a list of its lines."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file{nearest_path(path)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return text.split("\n")
        return (
            [json.loads(line) for line in text.split("\n") if line]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise DataError(f"{path}: is not json ({first_line(error)}).") from None


def _items(content: Any, path: str | Path, key: str) -> list[tuple[str, Any]]:
    """The items of a list, of the list under `key`, or of GQA's object, with their location in the file."""
    items = content.get(key) if isinstance(content, dict) else content
    if isinstance(content, dict) and any(
        "imageId" in one for one in content.values() if isinstance(one, dict)
    ):
        items = [{**one, "question_id": name} for name, one in content.items()]
    if not isinstance(items, list) or not items:
        raise DataError(f"{path}: holds no json list, by itself or under {key!r}.")
    return [(f"{path}: item {number}", item) for number, item in enumerate(items)]


def _first(item: Mapping[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) not in (None, "")), None)


def _texts(value: Any) -> list[str]:
    """The texts of a string, a list of strings, or of objects with one each; else an empty list."""
    several = value if isinstance(value, list) else [value]
    texts: list[Any] = [
        one.get("answer", one.get("raw")) if isinstance(one, dict) else one for one in several
    ]
    sound = all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts)
    return texts if sound else []


def _coco_number(image: Any) -> Any:
    """The number at the end of a COCO file name, used as key of results; else the name."""
    number = re.fullmatch(r"(?:.*_)?0*(\d+)", Path(image).stem) if isinstance(image, str) else None
    return int(number[1]) if number else image


def find_image_file(image: int | str, root: Path | None, annotations: Path, where: str) -> Path:
    """The file of an image named by path or COCO id.

    Raises:
        ImageError: not found, with the first path tried.
    """
    names = [name.format(image) for name in _COCO_NAMES] if isinstance(image, int) else [image]
    found = next(filter(None, (find_image(name, root, annotations) for name in names)), None)
    if found is None:
        raise ImageError(
            f"{where}: its image was not found: {root or annotations.parent}/{names[0][:200]}."
        )
    return found
