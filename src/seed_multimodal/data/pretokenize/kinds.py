"""The kinds of records that are written, each with exactly the keys its decoder reads (`data.decoders`).

| kind | record |
| --- | --- |
| caption | `image_ids`, `text` (a list where the input has several), `metadata` |
| qa | `image_ids` (of a list of pictures: one after the other), `question`, `answer` |
| video | `image_ids` (frame after frame), `answer`, and `question` where there is one |
| edit | `source_image_ids`, `target_image_ids`, `instruction` and/or `instruction_gpt` + `response` |
| story | `image_ids` (picture after picture), `caption0`, `caption1`, … |
| interleaved | `image_ids`, `texts` (parallel, None where the other is), `metadata`; or `instruction`, `response` |
| chat | `messages` |

With several views of a picture, caption and qa records also have `views`, whose first is the picture itself; in chats
pictures of the user have them (a decoder draws one), pictures of the assistant, which the model learns to draw, do not.

A kind reads a sample, in a decode worker, as the record it becomes with `Slot`s where codes will stand, and the
pictures to encode; `slots.filled` puts the codes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.pictures import Picture, frames
from seed_multimodal.data.pretokenize.samples import Dropped, Sample
from seed_multimodal.data.pretokenize.slots import Joined, Slot
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.language.tasks import DESCRIBE_PROMPT, DESCRIBE_VIDEO_PROMPT, QA_SUFFIX
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.settings import check_keys, nearest

Parsed = tuple[dict[str, Any], list[Picture]]


@dataclass(frozen=True)
class Kind:
    """One kind of records.

    Args:
        parse: (sample, settings, keys by what they hold) -> the record with `Slot`s, and its pictures.
        fields: keys of the input by what they hold; `ask`: a fixed question, `suffix`: put behind each question.
        presets: other such mappings by name; `default` is merged unless a preset is named.
        views: whether several views of a picture can be written.
    """

    name: str
    parse: Callable[[Sample, InputSettings, Mapping[str, str]], Parsed]
    fields: dict[str, str]
    presets: dict[str, dict[str, str]] = field(default_factory=dict)
    default: str = ""
    views: bool = False

    def keys(self, given: str | Mapping[str, str], where: str = "fields") -> dict[str, str]:
        """The keys used: a preset by name, or a mapping over the kind's own.

        Raises:
            ConfigError: an unknown preset or name; the nearest is named.
        """
        if isinstance(given, str):
            if given not in self.presets:
                known = ", ".join(self.presets) or "none"
                raise ConfigError(f"{where}: {given!r} is no preset of {self.name} data{nearest(given, self.presets)}; "
                                  f"there are {known}. Or map names: {', '.join(self.fields)}.")
            return {**self.fields, **self.presets[given]}
        check_keys(given, self.fields, where)
        base = self.presets.get(self.default, {}) if not given else {}
        return {**self.fields, **base, **{key: str(value) for key, value in given.items()}}


def get_kind(name: str) -> Kind:
    """A kind by name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in KINDS:
        raise ConfigError(f"There are no {name!r} records{nearest(name, KINDS)}: use {', '.join(KINDS)}.")
    return KINDS[name]


# ---- caption


def _parse_caption(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    data = sample.picture_member()
    value = sample.image(keys["image"])
    named = settings.use_caption_in_metadata
    text = sample.caption(settings.caption_key_in_metadata if named else keys["caption"], member=not named)
    metadata = sample.fields if data is not None else {
        key: sample.fields[key] for key in ("image_id", "id") if key in sample.fields}
    return {**_one_picture(), "text": text, "metadata": metadata}, [sample.picture(value)]


def _one_picture() -> dict[str, Any]:
    return {"image_ids": Slot((0,)), "views": Slot((0,), "views")}


# ---- qa, video


def _question(sample: Sample, keys: Mapping[str, str], *, required: bool = True) -> str | None:
    if keys["ask"]:
        return keys["ask"]
    question = sample.text(keys["question"], required=required)
    if question is None:
        return None
    suffix = keys["suffix"]
    return question if not suffix or question.endswith(suffix.strip()) else question.rstrip() + suffix


def _parse_qa(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    texts = {"question": _question(sample, keys), "answer": sample.text(keys["answer"])}
    value = sample.image(keys["image"])
    several = value if isinstance(value, list) else [value]
    if not several:
        raise BadRecord("missing key", f"{sample.where}: its list of pictures is empty.")
    if len(several) == 1:
        return {**_one_picture(), **texts}, [sample.picture(several[0])]
    return {"image_ids": Slot(tuple(range(len(several)))), **texts}, [
        sample.picture(picture, read=False) for picture in several]


def _parse_video(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    answer, question = sample.text(keys["answer"]), _question(sample, keys, required=False)
    texts = {"answer": answer} if question is None else {"question": question, "answer": answer}
    name, count = str(sample.text(keys["video"])), settings.num_frames
    pictures = frames(sample.path(name), f"{sample.where}: {name}", count)
    return {"image_ids": Slot(tuple(range(count))), **texts}, pictures


# ---- edit, story


def _parse_edit(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    texts = {name: sample.text(keys[name], required=False) for name in ("instruction", "instruction_gpt", "response")}
    found = {name: text for name, text in texts.items() if text is not None}
    if "instruction" not in found and not {"instruction_gpt", "response"} <= found.keys():
        raise BadRecord("missing key", f"{sample.where}: has no text under {keys['instruction']!r}, nor under both "
                        f"{keys['instruction_gpt']!r} and {keys['response']!r}.")
    return {"source_image_ids": Slot((0,)), "target_image_ids": Slot((1,)), **found}, [
        sample.picture(sample.fields.get(keys["source"])),
        sample.picture(sample.fields.get(keys["target"]), read=False)]


def _parse_story(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    pictures, captions = (_listed(sample, keys[name], settings.num_images) for name in ("images", "captions"))
    wanted = settings.num_images if settings.num_images is not None else max(2, len(pictures))
    if len(pictures) != wanted or len(captions) != wanted:
        keys_there = "" if pictures and captions else f" ({sample.keys()})"
        raise BadRecord("images and captions", f"{sample.where}: {counted(len(pictures), 'picture')} under "
                        f"{keys['images']!r} and {counted(len(captions), 'caption')} under {keys['captions']!r} "
                        f"where {wanted} of each belong{keys_there}.")
    if not all(isinstance(text, str) and text.strip() for text in captions):
        raise BadRecord("wrong type", f"{sample.where}: one of its {keys['captions']!r} is no text, or empty.")
    texts = {f"caption{number}": text for number, text in enumerate(captions)}
    return {"image_ids": Slot(tuple(range(wanted))), **texts}, [sample.picture(picture) for picture in pictures]


def _listed(sample: Sample, key: str, count: int | None) -> list[Any]:
    """The list under a key, or what stands under key0, key1, … (with the plural's s left out).

    One more than wanted is read, so that a story that is too long is not cut unnoticed.
    """
    if isinstance(sample.fields.get(key), list):
        return list(sample.fields[key])
    found: list[Any] = []
    while f"{key.removesuffix('s')}{len(found)}" in sample.fields and len(found) <= (count or 1000):
        found.append(sample.fields[f"{key.removesuffix('s')}{len(found)}"])
    return found


# ---- interleaved, chat


def _parse_interleaved(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    """A document, pictures and texts in turn, or an instruction and its response with `<image>` where a picture stands.

    A picture of a document that cannot be read is left out with its place, as released; one of an instruction is not.
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
        numbers = iter(range(count))
        return ({name: _with_pictures(text, numbers) for name, text in texts.items()},
                [sample.picture(image) for image in images])
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
    numbers = iter(range(len(pictures)))
    slots = [None if image is None else next(numbers) for image in images]
    metadata = sample.fields.get("metadata")
    return {"image_ids": [None if one is None else Slot((one,)) for one in slots],
            "texts": [text if one is None else Slot((one,), "none") for one, text in zip(slots, words, strict=True)],
            "metadata": {} if metadata is None else metadata}, pictures


def _with_pictures(text: str, numbers: Iterator[int]) -> Joined:
    """The text with the next pictures in place of its placeholders."""
    first, *others = text.split(PLACEHOLDER)
    return Joined((first, *(piece for other in others for piece in (next(numbers), other))))


def _parse_chat(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
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
                content.append({"codes": Slot((len(pictures),), "codes or views")})
                pictures.append(sample.picture(part["image"], read=message["role"] == "user"))
            else:
                content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"messages": messages, **({"system": found["system"]} if found.get("system") else {})}, pictures


def _has_own_pictures(fields: Mapping[str, Any]) -> bool:
    """Whether pictures stand in the messages themselves, not in a list beside them."""
    messages = fields.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    return any(isinstance(part, Mapping) and not part.keys().isdisjoint(("image", "image_url", "codes"))
               for content in contents if isinstance(content, list) for part in content)


_QA = {"image": "image", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
_VIDEO = {"video": "video", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
KINDS = {kind.name: kind for kind in (
    Kind("caption", _parse_caption, {"image": "image", "caption": "caption"}, views=True),
    # The released tool reads JourneyDB as it stands; its other variants were comments in the source.
    Kind("qa", _parse_qa, _QA, {
        "journeydb": {"ask": DESCRIBE_PROMPT, "answer": "caption"}, "describe": {"ask": DESCRIBE_PROMPT},
        "vqa": {"suffix": QA_SUFFIX}, "plain": {}}, default="journeydb", views=True),
    Kind("video", _parse_video, _VIDEO, {
        "plain": {}, "caption": {"question": "", "answer": "caption"}, "qa": {"suffix": QA_SUFFIX},
        "describe": {"ask": DESCRIBE_VIDEO_PROMPT, "answer": "caption"}}),
    Kind("edit", _parse_edit, {
        "source": "source_image", "target": "target_image", "instruction": "instruction",
        "instruction_gpt": "instruction_gpt", "response": "response"}),
    Kind("story", _parse_story, {"images": "images", "captions": "captions"}),
    Kind("interleaved", _parse_interleaved, {name: name for name in ("images", "texts", "instruction", "response")}),
    Kind("chat", _parse_chat, {}, views=True),
)}
