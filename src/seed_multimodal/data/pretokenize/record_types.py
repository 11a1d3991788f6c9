"""Kinds of output records, each with the keys that its decoder reads (`data.decoders`).

| kind | record |
| --- | --- |
| caption | `image_ids`, `text` (a list where the input has several), `metadata` |
| qa | `image_ids` (several images: concatenated), `question`, `answer` |
| video | `image_ids` (concatenated frames), `answer`, optional `question` |
| edit | `source_image_ids`, `target_image_ids`, `instruction` and/or `instruction_gpt` + `response` |
| story | `image_ids` (concatenated), `caption0`, `caption1`, … |
| interleaved | `image_ids`, `texts` (one of the two is None at each index), `metadata` |
| chat | `messages` |

With several views of an image, caption and qa records also have `views`, of which the first is the image itself; in
chats only images of the user have views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.images import (
    IMAGE_KEYS,
    captions,
    image_field,
    in_tar,
    missing_image,
    missing_key_text,
    record_image,
    text_member,
)
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record, find_image, shorten
from seed_multimodal.data.pretokenize.frames import Frame
from seed_multimodal.data.pretokenize.inputs import InputSettings
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, DESCRIBE_VIDEO_PROMPT, QA_SUFFIX
from seed_multimodal.settings import check_keys, nearest

Fields = dict[str, Any]
Codes = Sequence[list[list[int]] | None]  # views of each image; None: an unreadable optional image


class Dropped(Exception):
    """A filtered sample; `str` is the reason in the counts."""


@dataclass
class SourceImage:
    """An image to encode: the value that `images.record_image` reads, and its record."""

    value: Any
    record: Record
    read: bool = True  # an input of the model, which may have several views; else a target
    optional: bool = False  # the sample is kept without it

    @property
    def key(self) -> str:
        """Equal for equal images of neighbouring records; "": unknown."""
        return (
            self.value
            if isinstance(self.value, str)
            else repr(self.value)
            if callable(self.value)
            else ""
        )

    def load(self, root: str | None) -> Image.Image:
        """Read the image; paths are relative to `root`. Raises BadRecord, ImageError."""
        found, where = record_image(self.value, self.record, root), self.record.location
        if (
            isinstance(found, Path) and where != self.record.file
        ):  # else the record is the image's file
            where = f"{where}: {found}"
        return open_image(found, name=where)


class Sample:
    """Access to a record's content through `keys` (content -> field). Its methods raise BadRecord."""

    def __init__(
        self, record: Record, files: FileReader, settings: InputSettings, keys: Mapping[str, str]
    ) -> None:
        self.record, self.files, self.settings, self.keys = (
            record.parsed(files),
            files,
            settings,
            keys,
        )
        self.where, self.fields = record.location, self.record.fields

    def image(self, name: str = "image") -> Any:
        """The image's bytes in a tar, else the value under its key."""
        found: Any = self.record.member(*IMAGE_KEYS, files=self.files)
        found = image_field(self.fields, self.keys[name]) if found is None else found
        if found is None:
            raise missing_image(self.record, self.keys[name])
        return found

    def text(self, name: str, *, required: bool = True) -> str | None:
        """The text under a key; numbers are converted (NaN counts as blank), lists give their most frequent text."""
        key = self.keys[name]
        value = self.fields.get(key)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            value = max(value, key=value.count)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value) if value == value else None  # NaN: empty table cell
        if value is None or isinstance(value, str) and not value.strip():
            if required:
                raise BadRecord(
                    "missing key", f"{self.where}: {missing_key_text(key, self.fields)}."
                )
            return None
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"{self.where}: {key!r} is {shorten(value)}, not text.")
        return value


Read = tuple[Fields, list[SourceImage]]


def joined_record(fields: Fields, codes: Codes) -> Fields:
    """`image_ids` (concatenated), `views` of a single image if there are several, and the fields."""
    found = [views for views in codes if views]
    several = {"views": found[0]} if len(found) == 1 and len(found[0]) > 1 else {}
    return {"image_ids": [code for views in found for code in views[0]], **several, **fields}


@dataclass(frozen=True)
class RecordType:
    """One kind of records: `read` returns fields and images of a sample, in a decode worker; `record` builds the output
    from these fields and the images' codes."""

    name: str
    read: Callable[[Sample], Read]
    fields: dict[
        str, str
    ]  # content -> key; `ask`: a fixed question, `suffix`: appended to each question
    presets: dict[str, dict[str, str]] = field(
        default_factory=lambda: {"plain": {}}
    )  # the first is the default
    views: bool = False
    record: Callable[[Fields, Codes], Fields] = joined_record

    def keys(self, given: str | Mapping[str, str]) -> dict[str, str]:
        """The keys of a preset, or of a mapping over the kind's defaults. Raises ConfigError: an unknown name."""
        given = given or next(iter(self.presets))
        if isinstance(given, Mapping):
            check_keys(given, self.fields, "fields")
        elif given not in self.presets:
            raise ConfigError(
                f"fields: {given!r} is not a preset of {self.name} data{nearest(given, self.presets)}: "
                f"{', '.join(self.presets)}. Or map names: {', '.join(self.fields)}."
            )
        return {**self.fields, **(given if isinstance(given, Mapping) else self.presets[given])}


# ---- caption, qa, video, story


def _read_caption(sample: Sample) -> Read:
    settings, named = sample.settings, sample.settings.use_caption_in_metadata
    text = None if named else text_member(sample.record, sample.files)
    key = settings.caption_key_in_metadata if named else sample.keys["caption"]
    found = captions(sample.fields, key, sample.where) if text is None else [text]
    metadata = (
        sample.fields
        if in_tar(sample.record)
        else {key: sample.fields[key] for key in ("image_id", "id") if key in sample.fields}
    )
    fields = {"text": found if len(found) > 1 else found[0], "metadata": metadata}
    return fields, [SourceImage(sample.image(), sample.record)]


def _question(sample: Sample, *, required: bool = True) -> Fields:
    question = sample.keys["ask"] or sample.text("question", required=required)
    suffix = "" if sample.keys["ask"] else sample.keys["suffix"]
    if question is not None and suffix and not question.endswith(suffix.strip()):
        question = question.rstrip() + suffix
    return {} if question is None else {"question": question}


def _read_qa(sample: Sample) -> Read:
    fields = sample.fields
    if (
        sample.keys["answer"] == "caption"
        and fields.get("caption") is None
        and fields.get("question") is not None
    ):
        raise BadRecord(
            "missing key",
            f"{sample.where}: has a question, but no 'caption', which --fields journeydb "
            "(the default, as in the original) reads; use --fields vqa for questions with answers.",
        )
    fields = {**_question(sample), "answer": sample.text("answer")}
    value = sample.image()
    several = value if isinstance(value, list) else [value]
    return fields, [SourceImage(one, sample.record, read=len(several) == 1) for one in several]


def _read_video(sample: Sample) -> Read:
    count, name = sample.settings.num_frames, str(sample.text("video"))
    path = find_image(name, sample.settings.image_root, sample.record.file)
    if path is None:
        raise BadRecord("missing image", f"{sample.where}: no such video {name}.")
    return {**_question(sample, required=False), "answer": sample.text("answer")}, [
        SourceImage(Frame(str(path), count, number), sample.record) for number in range(count)
    ]


def _read_story(sample: Sample) -> Read:
    limit = sample.settings.num_images
    images, captions = (
        sample.fields.get(sample.keys[name]) or [] for name in ("images", "captions")
    )
    wanted = limit if limit is not None else max(2, len(images))
    if not len(images) == len(captions) == wanted or not all(
        isinstance(one, str) and one for one in captions
    ):
        raise BadRecord(
            "images and captions",
            f"{sample.where}: has {len(images)} images and {len(captions)} "
            f"captions; expected {wanted} of each.",
        )
    return {f"caption{number}": text for number, text in enumerate(captions)}, [
        SourceImage(image, sample.record) for image in images
    ]


# ---- edit, interleaved, chat


def _read_edit(sample: Sample) -> Read:
    keys = sample.keys
    texts = {
        name: sample.text(name, required=False)
        for name in ("instruction", "instruction_gpt", "response")
    }
    fields = {name: text for name, text in texts.items() if text is not None}
    if "instruction" not in fields and not {"instruction_gpt", "response"} <= fields.keys():
        raise BadRecord(
            "missing key",
            f"{sample.where}: has no text under {keys['instruction']!r} or under both "
            f"{keys['instruction_gpt']!r} and {keys['response']!r}.",
        )
    return fields, [
        SourceImage(sample.image("source"), sample.record),
        SourceImage(sample.image("target"), sample.record, read=False),
    ]


def _edit_record(fields: Fields, codes: Codes) -> Fields:
    source, target = (views[0] for views in codes if views)
    return {"source_image_ids": source, "target_image_ids": target, **fields}


def _read_interleaved(sample: Sample) -> Read:
    """A document; unreadable images are dropped with their index, as in the original."""
    images: Any
    texts: Any
    if "text_list" in sample.fields and "image_info" in sample.fields:
        images, texts = _mmc4_lists(sample.fields, sample.where)
    else:
        images, texts = (sample.fields.get(sample.keys[name]) for name in ("images", "texts"))
    if (
        not isinstance(images, list)
        or not isinstance(texts, list)
        or len(texts) != len(images)
        or any(
            (image is None) == (text is None) or not isinstance(text, str | None)
            for image, text in zip(images, texts, strict=True)
        )
    ):
        raise BadRecord(
            "images and texts",
            f"{sample.where}: {sample.keys['images']!r} and {sample.keys['texts']!r} "
            "must be lists of equal length, with None in one of them at each index.",
        )
    sources = [
        SourceImage(image, sample.record, optional=True) for image in images if image is not None
    ]
    if not sources:
        raise Dropped("no image")
    return {"texts": texts, "metadata": sample.fields.get("metadata") or {}}, sources


def _mmc4_lists(fields: Mapping[str, Any], where: str) -> tuple[list[Any], list[str | None]]:
    """The parallel lists of a record of MMC4 as published: each image stands before the sentence that it matches.

    `text_list`: sentences; `image_info`: for each image `matched_text_index`, and its base64 text (`image_base64`) or
    its file (`image_name`).
    """
    sentences, infos = fields["text_list"], fields["image_info"]
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise BadRecord("images and texts", f"{where}: 'text_list' and 'image_info' must be lists.")
    # The images of each sentence.
    before: list[list[Any]] = [[] for _ in sentences]
    for number, info in enumerate(infos):
        name, index = f"image_info[{number}]", info.get("matched_text_index")
        image = info.get("image_base64") or info.get("image_name")
        if not isinstance(index, int) or not 0 <= index < len(sentences) or image is None:
            raise BadRecord(
                "images and texts",
                f"{where}: {name}: needs a matched_text_index from 0 to "
                f"{len(sentences) - 1}, and image_base64 or image_name.",
            )
        before[index].append(image)

    # Each sentence behind its images: one list has a value where the other has None.
    images: list[Any] = []
    texts: list[str | None] = []
    for sentence, matched in zip(sentences, before, strict=True):
        images += [*matched, None]
        texts += [*(None for _ in matched), sentence]
    return images, texts


def _interleaved_record(fields: Fields, codes: Codes) -> Fields:
    shown = iter(codes)
    places = [(next(shown) if text is None else None, text) for text in fields["texts"]]
    places = [(views, text) for views, text in places if views or text is not None]
    return {
        "image_ids": [views and views[0] for views, _ in places],
        "texts": [text for _, text in places],
        "metadata": fields["metadata"],
    }


def _read_chat(sample: Sample) -> Read:
    data = sample.record.member(
        *IMAGE_KEYS, files=sample.files
    )  # image of a tar with conversations
    found = with_messages(
        sample.fields if data is None else {**sample.fields, "image": data}, sample.where
    )
    if "messages" not in found:
        raise BadRecord("missing key", f"{sample.where}: is not a conversation.")
    images: list[SourceImage] = []
    messages = []
    for message in found["messages"]:
        content: list[Any] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                images.append(
                    SourceImage(part["image"], sample.record, read=message["role"] == "user")
                )
                part = None
            content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {
        "messages": messages,
        **({"system": found["system"]} if found.get("system") else {}),
    }, images


def _chat_record(fields: Fields, codes: Codes) -> Fields:
    """The messages with the codes of each image, or of each of its views."""
    shown = (views if len(views) > 1 else views[0] for views in codes if views)
    return {
        **fields,
        "messages": [
            {
                **message,
                "content": [
                    {"codes": next(shown)} if part is None else part for part in message["content"]
                ],
            }
            for message in fields["messages"]
        ],
    }


_TEXTS = {"question": "question", "answer": "answer", "ask": "", "suffix": ""}
RECORD_TYPES = {
    kind.name: kind
    for kind in (
        RecordType("caption", _read_caption, {"image": "", "caption": ""}, views=True),
        # The original tool reads JourneyDB; its other variants were comments in the source.
        RecordType(
            "qa",
            _read_qa,
            {"image": "", **_TEXTS},
            {
                "journeydb": {"ask": DESCRIBE_PROMPT, "answer": "caption"},
                "describe": {"ask": DESCRIBE_PROMPT},
                "vqa": {"suffix": QA_SUFFIX},
                "plain": {},
            },
            views=True,
        ),
        RecordType(
            "video",
            _read_video,
            {"video": "video", **_TEXTS},
            {
                "plain": {},
                "caption": {"question": "", "answer": "caption"},
                "qa": {"suffix": QA_SUFFIX},
                "describe": {"ask": DESCRIBE_VIDEO_PROMPT, "answer": "caption"},
            },
        ),
        RecordType(
            "edit",
            _read_edit,
            {
                "source": "source_image",
                "target": "target_image",
                "instruction": "instruction",
                "instruction_gpt": "instruction_gpt",
                "response": "response",
            },
            record=_edit_record,
        ),
        RecordType("story", _read_story, {"images": "images", "captions": "captions"}),
        RecordType(
            "interleaved",
            _read_interleaved,
            {"images": "images", "texts": "texts"},
            record=_interleaved_record,
        ),
        RecordType("chat", _read_chat, {}, views=True, record=_chat_record),
    )
}
