"""Types of output records, each with the keys that its decoder reads (`data.decoders`).

| type | record |
| --- | --- |
| caption | `image_ids`, `text` (a list where the input has several), `metadata` |
| qa | `image_ids` (several images: concatenated), `question`, `answer` |
| video | `image_ids` (concatenated frames), `answer`, optional `question` |
| edit | `source_image_ids`, `target_image_ids`, `instruction`, or `instruction_gpt` + `response` |
| story | `image_ids` (concatenated), `caption0`, `caption1`, … |
| interleaved | `image_ids`, `texts` (one of the two is None at each index), `metadata` |
| chat | `messages` |

With several views of an image, caption and qa records also have `views`, of which the first is the
image itself; in chats only images of the user have views.

A type reads a record of the input as its output record with `SourceImage`s. These are replaced by
codes (a list of lists: of several views; None: unreadable and optional), then `joined` finishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.config import read_table
from seed_multimodal.data.decoders.seed_llama_pretrain import is_interleaved
from seed_multimodal.data.formats.conversations import (
    REPAIRED,
    conversation,
)
from seed_multimodal.data.formats.images import (
    IMAGE_KEYS,
    captions,
    find_image,
    image_value,
    in_tar,
    missing_key_text,
    record_image,
    text_member,
)
from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    JsonObject,
    Record,
    RecordFields,
    as_list,
    shorten,
)
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.language import prompts
from seed_multimodal.pretokenize.frames import Frame
from seed_multimodal.pretokenize.inputs import InputSettings
from seed_multimodal.settings import check_keys, nearest


class Dropped(Exception):
    """A filtered sample; `str` is the reason in the counts."""


@dataclass
class SourceImage:
    """An image to encode: the value that `images.record_image` reads, and its record."""

    value: FieldValue
    record: Record
    is_input: bool = True  # of the model, and may have several views; else a target
    optional: bool = False  # the sample is kept without it

    @property
    def key(self) -> str:
        """Equal for equal images of neighbouring records; "": unknown."""
        if isinstance(self.value, str):
            return self.value
        return repr(self.value) if callable(self.value) else ""

    def load(self, root: str | None) -> Image.Image:
        """Read the image; paths are relative to `root`. Raises BadRecord, ImageError."""
        image = record_image(self.value, self.record, root)
        name = self.record.location
        if isinstance(image, Path) and name != self.record.file:  # else it is the record's file
            name = f"{name}: {image}"
        return open_image(image, name=name).image


def replace_images(value: Any, kind: type, replacement: Callable[[Any], Any]) -> Any:
    """A record with each object of this type replaced, in order."""
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, Mapping):
        return {key: replace_images(item, kind, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_images(item, kind, replacement) for item in value]
    return value


class Sample:
    """Access to a record's content through `keys` (content -> field).

    repaired: what was repaired, to be counted.
    Its methods raise BadRecord.
    """

    def __init__(self, record: Record, settings: InputSettings, keys: Mapping[str, str]) -> None:
        self.record = record.parsed()
        self.settings = settings
        self.keys = keys
        self.location = record.location
        self.fields = self.record.fields
        self.repaired = ""

    def image_value(self, name: str) -> FieldValue:
        """The image's bytes in a tar, else the value under its key."""
        return image_value(self.record, self.keys[name])

    def image(self, name: str = "image", *, is_input: bool = True) -> SourceImage:
        """The image of `image_value`."""
        return SourceImage(self.image_value(name), self.record, is_input)

    def text(self, name: str, *, required: bool = True) -> str | None:
        """The text under a key.

        Numbers are converted (NaN counts as blank), lists give their most frequent text.
        """
        key = self.keys[name]
        value = self.fields.get(key)
        # 1. Lists and numbers; bool is a number, too.
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            value = max(value, key=value.count)
        if type(value) in (int, float):
            value = None if value != value else str(value)  # NaN: empty table cell

        # 2. A text, or none.
        if isinstance(value, str) and value.strip():
            return value
        if value is not None and not isinstance(value, str):
            raise BadRecord(
                "wrong type", f"{self.location}: {key!r} is {shorten(value)}, not text."
            )
        if required:
            message = f"{self.location}: {missing_key_text(key, self.fields)}."
            raise BadRecord("missing key", message)
        return None


def joined(record: JsonObject) -> JsonObject:
    """`image_ids`, if any, as one list, except of a document; with several views of the only image
    also `views`."""
    if "image_ids" not in record:
        return record
    if "texts" in record:
        return _without_lost_images(record)
    views = record["image_ids"][0]
    if isinstance(views[0], list):
        return {**record, "image_ids": views[0], "views": views}
    return {**record, "image_ids": [*chain.from_iterable(record["image_ids"])]}


@dataclass(frozen=True)
class RecordType:
    """One type of records."""

    name: str
    # The output record with `SourceImage`s, in a decode worker.
    read: Callable[[Sample], JsonObject]
    # This and the next two: see `record_types.yaml`.
    fields: dict[str, str]
    presets: dict[str, dict[str, str]]
    views: bool = False

    def keys(self, overrides: str | Mapping[str, str]) -> dict[str, str]:
        """The keys of a preset, or of a mapping over the type's defaults.

        Raises ConfigError: an unknown name.
        """
        overrides = overrides or next(iter(self.presets))
        if isinstance(overrides, Mapping):
            check_keys(overrides, self.fields, "fields")
        elif overrides in self.presets:
            preset = self.presets[overrides].items()
            overrides = {name: getattr(prompts, value, value) for name, value in preset}
        else:
            raise ConfigError(
                f"fields: {overrides!r} is not a preset of {self.name} data"
                f"{nearest(overrides, self.presets)}: {', '.join(self.presets)}. "
                f"Or map names: {', '.join(self.fields)}."
            )
        return {**self.fields, **overrides}


# ---- caption, qa, video, story


def _read_caption(sample: Sample) -> JsonObject:
    # 1. Captions: the tar's text, or one or more under a key.
    settings = sample.settings
    text = None
    key = settings.caption_key_in_metadata
    if not settings.use_caption_in_metadata:
        text = text_member(sample.record)
        key = sample.keys["caption"]
    texts = captions(sample.record, key) if text is None else [text]

    # 2. Metadata: all fields of a tar's record, else only its name.
    metadata = sample.fields
    if not in_tar(sample.record):
        metadata = {key: metadata[key] for key in ("image_id", "id") if key in metadata}
    return {
        "image_ids": [sample.image()],
        "text": texts if len(texts) > 1 else texts[0],
        "metadata": metadata,
    }


def _question(sample: Sample, *, required: bool = True) -> JsonObject:
    """The fixed question, or that of the sample with a suffix."""
    if sample.keys["ask"]:
        return {"question": sample.keys["ask"]}
    question = sample.text("question", required=required)
    if question is None:
        return {}
    suffix = sample.keys["suffix"]
    if suffix and not question.endswith(suffix.strip()):
        question = question.rstrip() + suffix
    return {"question": question}


def _read_qa(sample: Sample) -> JsonObject:
    fields = sample.fields
    has_caption = fields.get("caption") is not None
    has_question = fields.get("question") is not None
    if sample.keys["answer"] == "caption" and has_question and not has_caption:
        raise BadRecord(
            "missing key",
            f"{sample.location}: has a question, but no 'caption', which --fields journeydb "
            "(the default, as in the original) reads; use --fields vqa for questions with answers.",
        )
    question = _question(sample)
    answer = sample.text("answer")
    values = as_list(sample.image_value("image"))
    has_views = len(values) == 1  # several images are concatenated
    images = [SourceImage(value, sample.record, is_input=has_views) for value in values]
    return {"image_ids": images, **question, "answer": answer}


def _read_video(sample: Sample) -> JsonObject:
    count = sample.settings.num_frames
    name = str(sample.text("video"))
    path = find_image(name, sample.settings.image_root, sample.record.file)
    if path is None:
        raise BadRecord("missing image", f"{sample.location}: no such video {name}.")
    frames = [SourceImage(Frame(str(path), count, index), sample.record) for index in range(count)]
    question = _question(sample, required=False)
    return {"image_ids": frames, **question, "answer": sample.text("answer")}


def _read_story(sample: Sample) -> JsonObject:
    images = sample.fields.get(sample.keys["images"]) or []
    captions = sample.fields.get(sample.keys["captions"]) or []
    count = sample.settings.num_images
    if count is None:
        count = max(2, len(images))
    has_texts = all(isinstance(caption, str) and caption for caption in captions)
    if not len(images) == len(captions) == count or not has_texts:
        raise BadRecord(
            "images and captions",
            f"{sample.location}: has {len(images)} images and {len(captions)} "
            f"captions; expected {count} of each.",
        )
    texts = {f"caption{index}": text for index, text in enumerate(captions)}
    return {"image_ids": [SourceImage(image, sample.record) for image in images], **texts}


# ---- edit, interleaved, chat


def _read_edit(sample: Sample) -> JsonObject:
    keys = sample.keys
    texts = {}
    for name in ("instruction", "instruction_gpt", "response"):
        text = sample.text(name, required=False)
        if text is not None:
            texts[name] = text
    if "instruction" not in texts and not {"instruction_gpt", "response"} <= texts.keys():
        raise BadRecord(
            "missing key",
            f"{sample.location}: has no text under {keys['instruction']!r} or under both "
            f"{keys['instruction_gpt']!r} and {keys['response']!r}.",
        )
    return {
        "source_image_ids": sample.image("source"),
        "target_image_ids": sample.image("target", is_input=False),
        **texts,
    }


def _read_interleaved(sample: Sample) -> JsonObject:
    """A document: parallel lists of images and texts, one of which is None at each index."""
    images: FieldValue
    texts: FieldValue
    if "text_list" in sample.fields and "image_info" in sample.fields:
        images, texts = _mmc4_lists(sample.fields, sample.location)
    else:
        images = sample.fields.get(sample.keys["images"])
        texts = sample.fields.get(sample.keys["texts"])
    if not is_interleaved(images, texts):
        raise BadRecord(
            "images and texts",
            f"{sample.location}: {sample.keys['images']!r} and {sample.keys['texts']!r} "
            "must be lists of equal length, with None in one of them at each index.",
        )
    sources = [
        None if image is None else SourceImage(image, sample.record, optional=True)
        for image in images
    ]
    if not any(sources):
        raise Dropped("no image")
    metadata = sample.fields.get("metadata") or {}
    return {"image_ids": sources, "texts": texts, "metadata": metadata}


def _mmc4_lists(fields: RecordFields, location: str) -> tuple[list[FieldValue], list[str | None]]:
    """The parallel lists of a record of MMC4 as published: each image stands before the sentence
    that it matches.

    `text_list`: sentences; `image_info`: for each image `matched_text_index`, and its base64 text
        (`image_base64`) or its file (`image_name`).
    """
    sentences = fields["text_list"]
    infos = fields["image_info"]
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise BadRecord(
            "images and texts", f"{location}: 'text_list' and 'image_info' must be lists."
        )

    # 1. The images of each sentence.
    matches: list[list[FieldValue]] = [[] for _ in sentences]
    for info_index, info in enumerate(infos):
        index = info.get("matched_text_index")
        image = info.get("image_base64") or info.get("image_name")
        if not isinstance(index, int) or not 0 <= index < len(sentences) or image is None:
            raise BadRecord(
                "images and texts",
                f"{location}: image_info[{info_index}]: needs a matched_text_index from 0 to "
                f"{len(sentences) - 1}, and image_base64 or image_name.",
            )
        matches[index].append(image)

    # 2. Each sentence behind its images: one list has a value where the other has None.
    images: list[FieldValue] = []
    texts: list[str | None] = []
    for sentence, matched in zip(sentences, matches, strict=True):
        images += [*matched, None]
        texts += [*[None] * len(matched), sentence]
    return images, texts


def _without_lost_images(record: JsonObject) -> JsonObject:
    """A document without unreadable images and their index, as in the original."""
    elements = zip(record["image_ids"], record["texts"], strict=True)
    kept = [(codes, text) for codes, text in elements if codes is not None or text is not None]
    return {
        **record,
        "image_ids": [codes for codes, _ in kept],
        "texts": [text for _, text in kept],
    }


def _read_chat(sample: Sample) -> JsonObject:
    # 1. Messages of any known format; in a tar, the image is a member.
    fields = sample.fields
    image = sample.record.member(*IMAGE_KEYS)
    if image is not None:
        fields = {**fields, "image": image}
    fields = conversation(fields, sample.location)
    sample.repaired = fields.get(REPAIRED, "")

    # 2. Their images; only those of the user have views.
    messages = []
    for message in fields["messages"]:
        content: list[FieldValue] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                is_input = message["role"] == "user"
                part = {"codes": SourceImage(part["image"], sample.record, is_input)}
            content.append(part)
        messages.append({**message, "content": content})
    system = {"system": fields["system"]} if fields.get("system") else {}
    return {"messages": messages, **system}


_READERS = {
    "caption": _read_caption,
    "qa": _read_qa,
    "video": _read_video,
    "edit": _read_edit,
    "story": _read_story,
    "interleaved": _read_interleaved,
    "chat": _read_chat,
}
RECORD_TYPES = {
    name: RecordType(name, _READERS[name], **table) for name, table in read_table(__file__).items()
}
