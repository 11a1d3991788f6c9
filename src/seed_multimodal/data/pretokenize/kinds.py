"""The kinds of records that are written, each with exactly the keys its decoder reads (`data.decoders`).

| kind | record |
| --- | --- |
| caption | `image_ids`, `text` (a list where the input has several), `metadata` |
| qa | `image_ids` (of a list of pictures: one after the other), `question`, `answer` |
| video | `image_ids` (frame after frame), `answer`, and `question` where there is one |
| edit | `source_image_ids`, `target_image_ids`, `instruction` and/or `instruction_gpt` + `response` |
| story | `image_ids` (picture after picture), `caption0`, `caption1`, … |
| interleaved | `image_ids`, `texts` (parallel, None where the other is), `metadata` |
| chat | `messages` |

With several views of an image, caption and qa records also have `views`, whose first is the image itself; in chats
only images of the user have them.
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
    no_picture,
    nothing_under,
    stored_picture,
    text_member,
)
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record, find_image, shorten
from seed_multimodal.data.pretokenize.inputs import InputSettings
from seed_multimodal.data.pretokenize.pictures import Frame
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image
from seed_multimodal.language.tasks import DESCRIBE_PROMPT, DESCRIBE_VIDEO_PROMPT, QA_SUFFIX
from seed_multimodal.settings import check_keys, nearest

Fields = dict[str, Any]
Codes = Sequence[list[list[int]] | None]  # of each image its views; None: an optional one that cannot be read


class Dropped(Exception):
    """A sample that is not wanted (a filter, nothing to learn from); `str` is the reason it is counted under."""


@dataclass
class Picture:
    """An image to encode: what `images.stored_picture` reads, of a record."""

    value: Any
    record: Record
    read: bool = True  # by a model, so that it may have several views; else it is drawn
    optional: bool = False  # a sample without it is still worth keeping

    @property
    def key(self) -> str:
        """The same for equal images of neighbouring records; "": not known."""
        return self.value if isinstance(self.value, str) else repr(self.value) if callable(self.value) else ""

    def load(self, root: str | None) -> Image.Image:
        """Read the image, of a path below `root`. Raises BadRecord, ImageError."""
        found, where = stored_picture(self.value, self.record, root), self.record.where
        if isinstance(found, Path) and where != self.record.file:  # else the record is the image's file
            where = f"{where}: {found}"
        return open_image(found, name=where)


class Sample:
    """A record while a kind reads it; `keys`: of its fields by what they hold. Its methods raise BadRecord."""

    def __init__(self, record: Record, files: FileReader, settings: InputSettings, keys: Mapping[str, str]) -> None:
        self.record, self.files, self.settings, self.keys = record.parsed(files), files, settings, keys
        self.where, self.fields = record.where, self.record.fields

    def image(self, name: str = "image") -> Any:
        """What names an image: the member's bytes, else the value under a key."""
        found: Any = self.record.member(*IMAGE_KEYS, files=self.files)
        found = image_field(self.fields, self.keys[name]) if found is None else found
        if found is None:
            raise no_picture(self.record, self.keys[name])
        return found

    def text(self, name: str, *, required: bool = True) -> str | None:
        """The text under a key: also a number (NaN, like blanks, is nothing), of a list of texts the commonest one."""
        key = self.keys[name]
        value = self.fields.get(key)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            value = max(value, key=value.count)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value) if value == value else None  # NaN: an empty field of a table
        if value is None or isinstance(value, str) and not value.strip():
            if required:
                raise BadRecord("missing key", f"{self.where}: {nothing_under(key, self.fields)}.")
            return None
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"{self.where}: {key!r} is {shorten(value)}, not a text.")
        return value


Read = tuple[Fields, list[Picture]]


def joined_record(fields: Fields, codes: Codes) -> Fields:
    """`image_ids` (image after image), the `views` of a single one if there are several, the fields."""
    found = [views for views in codes if views]
    several = {"views": found[0]} if len(found) == 1 and len(found[0]) > 1 else {}
    return {"image_ids": [code for views in found for code in views[0]], **several, **fields}


@dataclass(frozen=True)
class Kind:
    """One kind of records: `read` takes the fields and images of a sample, in a decode worker; `record` makes the
    record of these fields and the images' codes."""

    name: str
    read: Callable[[Sample], Read]
    fields: dict[str, str]  # keys by what they hold; `ask`: a fixed question, `suffix`: put behind each question
    presets: dict[str, dict[str, str]] = field(default_factory=lambda: {"plain": {}})  # the first is the default
    views: bool = False
    record: Callable[[Fields, Codes], Fields] = joined_record

    def keys(self, given: str | Mapping[str, str]) -> dict[str, str]:
        """The keys used: a preset by name, or a mapping over the kind's own. Raises ConfigError: an unknown name."""
        given = given or next(iter(self.presets))
        if isinstance(given, Mapping):
            check_keys(given, self.fields, "fields")
        elif given not in self.presets:
            raise ConfigError(f"fields: {given!r} is no preset of {self.name} data{nearest(given, self.presets)}: "
                              f"{', '.join(self.presets)}. Or map names: {', '.join(self.fields)}.")
        return {**self.fields, **(given if isinstance(given, Mapping) else self.presets[given])}


# ---- caption, qa, video, story


def _read_caption(sample: Sample) -> Read:
    settings, named = sample.settings, sample.settings.use_caption_in_metadata
    text = None if named else text_member(sample.record, sample.files)
    key = settings.caption_key_in_metadata if named else sample.keys["caption"]
    found = captions(sample.fields, key, sample.where) if text is None else [text]
    metadata = sample.fields if in_tar(sample.record) else {
        key: sample.fields[key] for key in ("image_id", "id") if key in sample.fields}
    fields = {"text": found if len(found) > 1 else found[0], "metadata": metadata}
    return fields, [Picture(sample.image(), sample.record)]


def _question(sample: Sample, *, required: bool = True) -> Fields:
    question = sample.keys["ask"] or sample.text("question", required=required)
    suffix = "" if sample.keys["ask"] else sample.keys["suffix"]
    if question is not None and suffix and not question.endswith(suffix.strip()):
        question = question.rstrip() + suffix
    return {} if question is None else {"question": question}


def _read_qa(sample: Sample) -> Read:
    fields = {**_question(sample), "answer": sample.text("answer")}
    value = sample.image()
    several = value if isinstance(value, list) else [value]
    return fields, [Picture(one, sample.record, read=len(several) == 1) for one in several]


def _read_video(sample: Sample) -> Read:
    count, name = sample.settings.num_frames, str(sample.text("video"))
    path = find_image(name, sample.settings.image_root, sample.record.file)
    if path is None:
        raise BadRecord("missing picture", f"{sample.where}: there is no video {name}.")
    return {**_question(sample, required=False), "answer": sample.text("answer")}, [
        Picture(Frame(str(path), count, number), sample.record) for number in range(count)]


def _read_story(sample: Sample) -> Read:
    limit = sample.settings.num_images
    pictures, captions = (sample.fields.get(sample.keys[name]) or [] for name in ("images", "captions"))
    wanted = limit if limit is not None else max(2, len(pictures))
    if not len(pictures) == len(captions) == wanted or not all(isinstance(one, str) and one for one in captions):
        raise BadRecord("images and captions", f"{sample.where}: has {len(pictures)} images and {len(captions)} "
                        f"captions where {wanted} of each belong.")
    return {f"caption{number}": text for number, text in enumerate(captions)}, [
        Picture(picture, sample.record) for picture in pictures]


# ---- edit, interleaved, chat


def _read_edit(sample: Sample) -> Read:
    keys = sample.keys
    texts = {name: sample.text(name, required=False) for name in ("instruction", "instruction_gpt", "response")}
    fields = {name: text for name, text in texts.items() if text is not None}
    if "instruction" not in fields and not {"instruction_gpt", "response"} <= fields.keys():
        raise BadRecord("missing key", f"{sample.where}: has no text under {keys['instruction']!r}, nor under both "
                        f"{keys['instruction_gpt']!r} and {keys['response']!r}.")
    return fields, [Picture(sample.image("source"), sample.record),
                    Picture(sample.image("target"), sample.record, read=False)]


def _edit_record(fields: Fields, codes: Codes) -> Fields:
    source, target = (views[0] for views in codes if views)
    return {"source_image_ids": source, "target_image_ids": target, **fields}


def _read_interleaved(sample: Sample) -> Read:
    """A document. An image that cannot be read is left out with its place, as in the original."""
    images, texts = (sample.fields.get(sample.keys[name]) for name in ("images", "texts"))
    if not isinstance(images, list) or not isinstance(texts, list) or len(texts) != len(images) or any(
            (image is None) == (text is None) or not isinstance(text, str | None)
            for image, text in zip(images, texts, strict=True)):
        raise BadRecord("images and texts", f"{sample.where}: {sample.keys['images']!r} and {sample.keys['texts']!r} "
                        "must be lists of one length, with None where the other stands.")
    pictures = [Picture(image, sample.record, optional=True) for image in images if image is not None]
    if not pictures:
        raise Dropped("no image")
    return {"texts": texts, "metadata": sample.fields.get("metadata") or {}}, pictures


def _interleaved_record(fields: Fields, codes: Codes) -> Fields:
    shown = iter(codes)
    places = [(next(shown) if text is None else None, text) for text in fields["texts"]]
    places = [(views, text) for views, text in places if views or text is not None]
    return {"image_ids": [views and views[0] for views, _ in places], "texts": [text for _, text in places],
            "metadata": fields["metadata"]}


def _read_chat(sample: Sample) -> Read:
    data = sample.record.member(*IMAGE_KEYS, files=sample.files)  # of a tar of images with their conversation
    found = with_messages(sample.fields if data is None else {**sample.fields, "image": data}, sample.where)
    if "messages" not in found:
        raise BadRecord("missing key", f"{sample.where}: is no conversation.")
    pictures: list[Picture] = []
    messages = []
    for message in found["messages"]:
        content: list[Any] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                pictures.append(Picture(part["image"], sample.record, read=message["role"] == "user"))
                part = None
            content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"messages": messages, **({"system": found["system"]} if found.get("system") else {})}, pictures


def _chat_record(fields: Fields, codes: Codes) -> Fields:
    """The codes of each image in its place, or those of each of its views."""
    shown = (views if len(views) > 1 else views[0] for views in codes if views)
    return {**fields, "messages": [
        {**message, "content": [{"codes": next(shown)} if part is None else part for part in message["content"]]}
        for message in fields["messages"]]}


_TEXTS = {"question": "question", "answer": "answer", "ask": "", "suffix": ""}
KINDS = {kind.name: kind for kind in (
    Kind("caption", _read_caption, {"image": "", "caption": ""}, views=True),
    # The original tool reads JourneyDB as it stands; its other variants were comments in the source.
    Kind("qa", _read_qa, {"image": "", **_TEXTS}, {
        "journeydb": {"ask": DESCRIBE_PROMPT, "answer": "caption"}, "describe": {"ask": DESCRIBE_PROMPT},
        "vqa": {"suffix": QA_SUFFIX}, "plain": {}}, views=True),
    Kind("video", _read_video, {"video": "video", **_TEXTS}, {
        "plain": {}, "caption": {"question": "", "answer": "caption"}, "qa": {"suffix": QA_SUFFIX},
        "describe": {"ask": DESCRIBE_VIDEO_PROMPT, "answer": "caption"}}),
    Kind("edit", _read_edit, {
        "source": "source_image", "target": "target_image", "instruction": "instruction",
        "instruction_gpt": "instruction_gpt", "response": "response"}, record=_edit_record),
    Kind("story", _read_story, {"images": "images", "captions": "captions"}),
    Kind("interleaved", _read_interleaved, {"images": "images", "texts": "texts"}, record=_interleaved_record),
    Kind("chat", _read_chat, {}, views=True, record=_chat_record),
)}
