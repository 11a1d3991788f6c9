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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    FileReader,
    JsonObject,
    Record,
    RecordFields,
    as_list,
    find_image,
    shorten,
)
from seed_multimodal.data.pretokenize.frames import Frame
from seed_multimodal.data.pretokenize.inputs import InputSettings
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, DESCRIBE_VIDEO_PROMPT, QA_SUFFIX
from seed_multimodal.settings import check_keys, nearest

Codes = Sequence[list[list[int]] | None]  # views of each image; None: an unreadable optional image


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


class Sample:
    """Access to a record's content through `keys` (content -> field).

    Its methods raise BadRecord.
    """

    def __init__(
        self, record: Record, files: FileReader, settings: InputSettings, keys: Mapping[str, str]
    ) -> None:
        self.record = record.parsed(files)
        self.files = files
        self.settings = settings
        self.keys = keys
        self.location = record.location
        self.fields = self.record.fields

    def image(self, name: str = "image") -> FieldValue:
        """The image's bytes in a tar, else the value under its key."""
        image: FieldValue = self.record.member(*IMAGE_KEYS, files=self.files)
        if image is None:
            image = image_field(self.fields, self.keys[name])
        if image is None:
            raise missing_image(self.record, self.keys[name])
        return image

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


FieldsAndImages = tuple[JsonObject, list[SourceImage]]


def joined_record(fields: JsonObject, codes: Codes) -> JsonObject:
    """`image_ids` (concatenated), `views` of an image if there are several, and the fields."""
    images = list(filter(None, codes))
    image_ids: list[int] = []
    for views in images:
        image_ids += views[0]
    record: JsonObject = {"image_ids": image_ids}
    if len(images) == 1 and len(images[0]) > 1:
        record["views"] = images[0]
    return {**record, **fields}


@dataclass(frozen=True)
class RecordType:
    """One type of records."""

    name: str
    # JsonObject and images of a sample, in a decode worker.
    read: Callable[[Sample], FieldsAndImages]
    # Content -> key; `ask`: a fixed question, `suffix`: appended to each question.
    fields: dict[str, str]
    # The first is the default.
    presets: dict[str, dict[str, str]] = field(default_factory=lambda: {"plain": {}})
    views: bool = False  # input images may have several views
    # The output record, from the fields and the images' codes.
    record: Callable[[JsonObject, Codes], JsonObject] = joined_record

    def keys(self, overrides: str | Mapping[str, str]) -> dict[str, str]:
        """The keys of a preset, or of a mapping over the type's defaults.

        Raises ConfigError: an unknown name.
        """
        overrides = overrides or next(iter(self.presets))
        if isinstance(overrides, Mapping):
            check_keys(overrides, self.fields, "fields")
        elif overrides in self.presets:
            overrides = self.presets[overrides]
        else:
            raise ConfigError(
                f"fields: {overrides!r} is not a preset of {self.name} data"
                f"{nearest(overrides, self.presets)}: {', '.join(self.presets)}. "
                f"Or map names: {', '.join(self.fields)}."
            )
        return {**self.fields, **overrides}


# ---- caption, qa, video, story


def _read_caption(sample: Sample) -> FieldsAndImages:
    # 1. Captions: the tar's text, or one or more under a key.
    settings = sample.settings
    text = None
    key = settings.caption_key_in_metadata
    if not settings.use_caption_in_metadata:
        text = text_member(sample.record, sample.files)
        key = sample.keys["caption"]
    texts = captions(sample.fields, key, sample.location) if text is None else [text]

    # 2. Metadata: all fields of a tar's record, else only its name.
    metadata = sample.fields
    if not in_tar(sample.record):
        metadata = {key: metadata[key] for key in ("image_id", "id") if key in metadata}
    fields = {"text": texts if len(texts) > 1 else texts[0], "metadata": metadata}
    return fields, [SourceImage(sample.image(), sample.record)]


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


def _read_qa(sample: Sample) -> FieldsAndImages:
    fields = sample.fields
    has_caption = fields.get("caption") is not None
    has_question = fields.get("question") is not None
    if sample.keys["answer"] == "caption" and has_question and not has_caption:
        raise BadRecord(
            "missing key",
            f"{sample.location}: has a question, but no 'caption', which --fields journeydb "
            "(the default, as in the original) reads; use --fields vqa for questions with answers.",
        )
    fields = {**_question(sample), "answer": sample.text("answer")}
    values = as_list(sample.image())
    has_views = len(values) == 1  # several images are concatenated
    return fields, [SourceImage(value, sample.record, is_input=has_views) for value in values]


def _read_video(sample: Sample) -> FieldsAndImages:
    count = sample.settings.num_frames
    name = str(sample.text("video"))
    path = find_image(name, sample.settings.image_root, sample.record.file)
    if path is None:
        raise BadRecord("missing image", f"{sample.location}: no such video {name}.")
    fields = {**_question(sample, required=False), "answer": sample.text("answer")}
    frames = [Frame(str(path), count, index) for index in range(count)]
    return fields, [SourceImage(frame, sample.record) for frame in frames]


def _read_story(sample: Sample) -> FieldsAndImages:
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
    fields = {f"caption{index}": text for index, text in enumerate(captions)}
    return fields, [SourceImage(image, sample.record) for image in images]


# ---- edit, interleaved, chat


def _read_edit(sample: Sample) -> FieldsAndImages:
    keys = sample.keys
    fields = {}
    for name in ("instruction", "instruction_gpt", "response"):
        text = sample.text(name, required=False)
        if text is not None:
            fields[name] = text
    if "instruction" not in fields and not {"instruction_gpt", "response"} <= fields.keys():
        raise BadRecord(
            "missing key",
            f"{sample.location}: has no text under {keys['instruction']!r} or under both "
            f"{keys['instruction_gpt']!r} and {keys['response']!r}.",
        )
    source = SourceImage(sample.image("source"), sample.record)
    target = SourceImage(sample.image("target"), sample.record, is_input=False)
    return fields, [source, target]


def _edit_record(fields: JsonObject, codes: Codes) -> JsonObject:
    source, target = (views[0] for views in codes if views)
    return {"source_image_ids": source, "target_image_ids": target, **fields}


def _read_interleaved(sample: Sample) -> FieldsAndImages:
    """A document; unreadable images are dropped with their index, as in the original."""
    # 1. Parallel lists of images and texts, one of which is None at each index.
    images: FieldValue
    texts: FieldValue
    if "text_list" in sample.fields and "image_info" in sample.fields:
        images, texts = _mmc4_lists(sample.fields, sample.location)
    else:
        images = sample.fields.get(sample.keys["images"])
        texts = sample.fields.get(sample.keys["texts"])
    if not _are_parallel(images, texts):
        raise BadRecord(
            "images and texts",
            f"{sample.location}: {sample.keys['images']!r} and {sample.keys['texts']!r} "
            "must be lists of equal length, with None in one of them at each index.",
        )

    # 2. The images.
    sources = [
        SourceImage(image, sample.record, optional=True) for image in images if image is not None
    ]
    if not sources:
        raise Dropped("no image")
    return {"texts": texts, "metadata": sample.fields.get("metadata") or {}}, sources


def _are_parallel(images: FieldValue, texts: FieldValue) -> bool:
    """Whether two lists have equal length, and an image or a text at each index."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(texts) != len(images):
        return False
    return all(
        (image is None) != (text is None) and isinstance(text, str | None)
        for image, text in zip(images, texts, strict=True)
    )


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


def _interleaved_record(fields: JsonObject, codes: Codes) -> JsonObject:
    """The lists without unreadable images."""
    image_codes = iter(codes)
    image_ids: list[list[int] | None] = []
    texts: list[str | None] = []
    for text in fields["texts"]:
        if text is not None:
            image_ids.append(None)
            texts.append(text)
            continue
        views = next(image_codes)
        if views:
            image_ids.append(views[0])
            texts.append(None)
    return {"image_ids": image_ids, "texts": texts, "metadata": fields["metadata"]}


def _read_chat(sample: Sample) -> FieldsAndImages:
    """A conversation; None in a message's content stands for its next image."""
    # 1. Messages of any known format; in a tar, the image is a member.
    fields = sample.fields
    image = sample.record.member(*IMAGE_KEYS, files=sample.files)
    if image is not None:
        fields = {**fields, "image": image}
    fields = with_messages(fields, sample.location)
    if "messages" not in fields:
        raise BadRecord("missing key", f"{sample.location}: is not a conversation.")

    # 2. Images of the messages; only those of the user have views.
    images: list[SourceImage] = []
    messages = []
    for message in fields["messages"]:
        role = message["role"]
        content: list[FieldValue] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                images.append(SourceImage(part["image"], sample.record, is_input=role == "user"))
                part = None
            content.append(part)
        messages.append({"role": role, "content": content})
    chat: JsonObject = {"messages": messages}
    if fields.get("system"):
        chat["system"] = fields["system"]
    return chat, images


def _chat_record(fields: JsonObject, codes: Codes) -> JsonObject:
    """The messages with the codes of each image, or of each of its views."""
    image_codes = filter(None, codes)
    messages = []
    for message in fields["messages"]:
        content = []
        for part in message["content"]:
            if part is None:
                views = next(image_codes)
                part = {"codes": views if len(views) > 1 else views[0]}
            content.append(part)
        messages.append({**message, "content": content})
    return {**fields, "messages": messages}


_TEXTS = {"question": "question", "answer": "answer", "ask": "", "suffix": ""}
RECORD_TYPES = {
    record_type.name: record_type
    for record_type in (
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
