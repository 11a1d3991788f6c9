"""Records with pictures among their texts: documents, instructions and conversations.

Documents are pictures and texts in turn (pretraining, as MMC4). A picture of a document that cannot be read is left out
with its place, as released; one of an instruction (with `<image>` where a picture stands) is not.

Conversations of any spelling (`data.formats.conversations`) become `messages` whose pictures are codes. With several views, pictures
of the user get all of them (a decoder draws one); pictures of the assistant, which the model learns to draw, get one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.pretokenize.samples import Dropped, Picture, Sample
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import PLACEHOLDER, ImageVocabulary

FIELDS = {"images": "images", "texts": "texts", "instruction": "instruction", "response": "response"}


def parse_document(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> tuple[dict[str, Any], list[Picture]]:
    """A document, or an instruction and its response with `<image>` where a picture stands.

    Raises:
        BadRecord: lists of different length, a place with both or neither, or as many pictures as placeholders do not
            stand for.
        Dropped: a document without any picture.
    """
    images = sample.fields.get(keys["images"])
    if not isinstance(images, list):
        raise BadRecord("missing key", f"{sample.where}: has no list of pictures under {keys['images']!r} "
                        f"({sample.keys()}).")
    if keys["instruction"] in sample.fields:
        texts = {name: str(sample.text(keys[name])) for name in ("instruction", "response")}
        count = sum(text.count(PLACEHOLDER) for text in texts.values())
        if count != len(images):
            raise BadRecord("images and placeholders", f"{sample.where}: {count} {PLACEHOLDER} placeholders for "
                            f"{len(images)} pictures.")
        return texts, [sample.picture(image) for image in images]
    words = sample.fields.get(keys["texts"])
    if not isinstance(words, list) or len(words) != len(images):
        raise BadRecord("images and texts", f"{sample.where}: {keys['images']!r} and {keys['texts']!r} must be lists "
                        "of one length, with None where the other stands.")
    for place, (image, text) in enumerate(zip(images, words, strict=True)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise BadRecord("images and texts", f"{sample.where}: place {place} must hold a picture or a text.")
    pictures = [sample.picture(image, optional=True) for image in images if image is not None]
    if not pictures:
        raise Dropped("no picture")
    metadata = sample.fields.get("metadata")
    return {"texts": words, "metadata": {} if metadata is None else metadata}, pictures


def document_record(parsed: dict[str, Any], codes: list[list[list[int]] | None], vocabulary: ImageVocabulary) -> dict[str, Any]:
    """The record of what `parse_document` gave."""
    left = iter(codes)
    if "instruction" in parsed:
        return {name: _filled(parsed[name], left, vocabulary) for name in ("instruction", "response")}
    places = [(None, text) if text is not None else (next(left), None) for text in parsed["texts"]]
    kept = [(None if views is None else views[0], text) for views, text in places
            if views is not None or text is not None]
    return {"image_ids": [image for image, _ in kept], "texts": [text for _, text in kept],
            "metadata": parsed["metadata"]}


def _filled(text: str, left: Iterator[list[list[int]] | None], vocabulary: ImageVocabulary) -> str:
    """The text with the words of each picture in place of its placeholder."""
    first, *others = text.split(PLACEHOLDER)
    words = []
    for other in others:
        views = next(left)
        assert views is not None
        words.append(vocabulary.image_text(views[0]) + other)
    return first + "".join(words)


# ---- conversations


def parse_conversation(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> tuple[dict[str, Any], list[Picture]]:
    """Messages with `{"picture": n}` where the n-th picture stands.

    Raises:
        BadRecord: no conversation, or one that `with_messages` refuses.
    """
    fields = sample.fields
    data = sample.picture_member()
    if data is not None:  # a tar of pictures with their conversation
        fields = {**fields, "image": data}
    if _has_own_pictures(fields):
        fields = {key: fields[key] for key in ("messages", "system") if key in fields}  # its pictures stand in place
    found = with_messages(fields, sample.where)
    if "messages" not in found:
        have = ", ".join(sorted(map(str, fields))[:8]) or "no keys"
        raise BadRecord("missing key", f"{sample.where}: is no conversation (it has {have}).")
    pictures: list[Picture] = []
    messages = []
    for message in found["messages"]:
        content: list[Any] = []
        for part in message["content"]:
            if isinstance(part, Mapping) and "image" in part:
                content.append({"picture": len(pictures)})
                pictures.append(sample.picture(part["image"], read=message["role"] == "user"))
            else:
                content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"messages": messages, **({"system": found["system"]} if found.get("system") else {})}, pictures


def conversation_record(parsed: dict[str, Any], codes: list[list[list[int]] | None], vocabulary: ImageVocabulary) -> dict[str, Any]:
    """The record of what `parse_conversation` gave."""

    def part(value: Any) -> Any:
        if not isinstance(value, Mapping) or "picture" not in value:
            return value
        views = codes[value["picture"]]
        assert views is not None
        return {"codes": views if len(views) > 1 else views[0]}

    messages = [{"role": message["role"], "content": [part(value) for value in message["content"]]}
                for message in parsed["messages"]]
    return {**parsed, "messages": messages}


def _has_own_pictures(fields: Mapping[str, Any]) -> bool:
    """Whether pictures stand in the messages themselves, not in a list beside them."""
    messages = fields.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    return any(isinstance(part, Mapping) and not part.keys().isdisjoint(("image", "image_url", "codes"))
               for content in contents if isinstance(content, list) for part in content)
