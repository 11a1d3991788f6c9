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
only images of the user have them. A kind is two functions: `read` takes the fields and images of a sample, in a decode
worker; `record` makes the record of these fields and the images' codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.images import nothing_under
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.pretokenize.samples import Dropped, Picture, Sample
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tasks import DESCRIBE_PROMPT, DESCRIBE_VIDEO_PROMPT, QA_SUFFIX
from seed_multimodal.settings import check_keys, nearest

Fields = dict[str, Any]
Read = tuple[Fields, list[Picture]]
Codes = Sequence[list[list[int]] | None]  # of each image its views; None: an optional one that cannot be read


def joined_record(fields: Fields, codes: Codes) -> Fields:
    """`image_ids` (image after image), the `views` of a single one if there are several, the fields."""
    found = [views for views in codes if views]
    several = {"views": found[0]} if len(found) == 1 and len(found[0]) > 1 else {}
    return {"image_ids": [code for views in found for code in views[0]], **several, **fields}


@dataclass(frozen=True)
class Kind:
    """One kind of records."""

    name: str
    read: Callable[[Sample], Read]
    fields: dict[str, str]  # keys by what they hold; `ask`: a fixed question, `suffix`: put behind each question
    presets: dict[str, dict[str, str]] = field(default_factory=lambda: {"plain": {}})  # other such mappings by name
    default: str = "plain"  # the preset used where nothing is given
    views: bool = False
    record: Callable[[Fields, Codes], Fields] = joined_record

    def keys(self, given: str | Mapping[str, str]) -> dict[str, str]:
        """The keys used: a preset by name, or a mapping over the kind's own. Raises ConfigError: an unknown name."""
        given = given or self.default
        if isinstance(given, Mapping):
            check_keys(given, self.fields, "fields")
        elif given not in self.presets:
            raise ConfigError(f"fields: {given!r} is no preset of {self.name} data{nearest(given, self.presets)}: "
                              f"{', '.join(self.presets)}. Or map names: {', '.join(self.fields)}.")
        return {**self.fields, **(given if isinstance(given, Mapping) else self.presets[given])}


# ---- caption, qa, video, story


def _read_caption(sample: Sample) -> Read:
    settings, in_tar = sample.settings, sample.picture_member() is not None
    value = sample.image(sample.keys["image"])
    named = settings.use_caption_in_metadata
    text = sample.caption(settings.caption_key_in_metadata if named else sample.keys["caption"], member=not named)
    metadata = sample.fields if in_tar else {key: sample.fields[key] for key in ("image_id", "id")
                                             if key in sample.fields}
    return {"text": text, "metadata": metadata}, [sample.picture(value)]


def _question(sample: Sample, *, required: bool = True) -> Fields:
    question = sample.keys["ask"] or sample.text(sample.keys["question"], required=required)
    suffix = "" if sample.keys["ask"] else sample.keys["suffix"]
    if question is not None and suffix and not question.endswith(suffix.strip()):
        question = question.rstrip() + suffix
    return {} if question is None else {"question": question}


def _read_qa(sample: Sample) -> Read:
    fields = {**_question(sample), "answer": sample.text(sample.keys["answer"])}
    value = sample.image(sample.keys["image"])
    several = value if isinstance(value, list) else [value]
    return fields, [sample.picture(one, read=len(several) == 1) for one in several]


def _read_video(sample: Sample) -> Read:
    answer = sample.text(sample.keys["answer"])
    frames = sample.frames(str(sample.text(sample.keys["video"])))
    return {**_question(sample, required=False), "answer": answer}, frames


def _read_story(sample: Sample) -> Read:
    limit = sample.settings.num_images
    pictures, captions = (_listed(sample, sample.keys[name]) for name in ("images", "captions"))
    wanted = limit if limit is not None else max(2, len(pictures))
    if not len(pictures) == len(captions) == wanted or not all(isinstance(one, str) and one for one in captions):
        raise BadRecord("images and captions", f"{sample.where}: has {len(pictures)} images and {len(captions)} "
                        f"captions where {wanted} of each belong.")
    return {f"caption{number}": text for number, text in enumerate(captions)}, [
        sample.picture(picture) for picture in pictures]


def _listed(sample: Sample, key: str) -> list[Any]:
    """The list under a key, or what stands under key0, key1, … (with the plural's s left out)."""
    if isinstance(sample.fields.get(key), list):
        return list(sample.fields[key])
    names = (f"{key.removesuffix('s')}{number}" for number in itertools.count())
    return [sample.fields[name] for name in itertools.takewhile(sample.fields.__contains__, names)]


# ---- edit, interleaved, chat


def _read_edit(sample: Sample) -> Read:
    keys = sample.keys
    texts = {name: sample.text(keys[name], required=False) for name in ("instruction", "instruction_gpt", "response")}
    fields = {name: text for name, text in texts.items() if text is not None}
    if "instruction" not in fields and not {"instruction_gpt", "response"} <= fields.keys():
        raise BadRecord("missing key", f"{sample.where}: has no text under {keys['instruction']!r}, nor under both "
                        f"{keys['instruction_gpt']!r} and {keys['response']!r}.")
    return fields, [sample.picture(sample.image(keys["source"])),
                    sample.picture(sample.image(keys["target"]), read=False)]


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
    pictures = [sample.picture(image, optional=True) for image in images if image is not None]
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
    data = sample.picture_member()  # of a tar of images with their conversation
    found = with_messages(sample.fields if data is None else {**sample.fields, "image": data}, sample.where)
    if "messages" not in found:
        raise BadRecord("missing key", f"{sample.where}: is no conversation: "
                        f"{nothing_under('messages', sample.fields)}.")
    pictures: list[Picture] = []
    messages = []
    for message in found["messages"]:
        content: list[Any] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                pictures.append(sample.picture(part["image"], read=message["role"] == "user"))
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


_QA = {"image": "image", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
_VIDEO = {"video": "video", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
KINDS = {kind.name: kind for kind in (
    Kind("caption", _read_caption, {"image": "image", "caption": "caption"}, views=True),
    # The original tool reads JourneyDB as it stands; its other variants were comments in the source.
    Kind("qa", _read_qa, _QA, {
        "journeydb": {"ask": DESCRIBE_PROMPT, "answer": "caption"}, "describe": {"ask": DESCRIBE_PROMPT},
        "vqa": {"suffix": QA_SUFFIX}, "plain": {}}, default="journeydb", views=True),
    Kind("video", _read_video, _VIDEO, {
        "plain": {}, "caption": {"question": "", "answer": "caption"}, "qa": {"suffix": QA_SUFFIX},
        "describe": {"ask": DESCRIBE_VIDEO_PROMPT, "answer": "caption"}}),
    Kind("edit", _read_edit, {
        "source": "source_image", "target": "target_image", "instruction": "instruction",
        "instruction_gpt": "instruction_gpt", "response": "response"}, record=_edit_record),
    Kind("story", _read_story, {"images": "images", "captions": "captions"}),
    Kind("interleaved", _read_interleaved, {"images": "images", "texts": "texts"}, record=_interleaved_record),
    Kind("chat", _read_chat, {}, views=True, record=_chat_record),
)}
