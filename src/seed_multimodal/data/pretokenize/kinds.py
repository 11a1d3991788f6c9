"""The kinds of records that are written, each with exactly the keys its decoder reads (`data.decoders.registry`).

| kind | record |
| --- | --- |
| caption | `image_ids`, `text` (a list where the input has several), `metadata` |
| qa | `image_ids` (of a list of pictures: one after the other), `question`, `answer` |
| video | `image_ids` (frame after frame), `answer`, and `question` where there is one |
| edit | `source_image_ids`, `target_image_ids`, `instruction` and/or `instruction_gpt` + `response` |
| story | `image_ids` (picture after picture), `caption0`, `caption1`, … |
| interleaved | `image_ids`, `texts` (parallel, None where the other is), `metadata`; or `instruction`, `response` |
| chat | `messages` |

With several views of a picture, caption and qa records also have `views`, whose first is the picture itself.

A kind reads a sample in a decode worker (`parse`: which pictures, which texts) and makes the record of the codes in
the process that encodes (`record`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.data.pretokenize.documents import FIELDS as DOCUMENT_FIELDS
from seed_multimodal.data.pretokenize.documents import (
    conversation_record,
    document_record,
    parse_conversation,
    parse_document,
)
from seed_multimodal.data.pretokenize.pictures import frames
from seed_multimodal.data.pretokenize.samples import Dropped, Picture, Sample
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.language.prompts import DESCRIBE_VIDEO_PROMPT
from seed_multimodal.language.tasks import DESCRIBE_PROMPT, QA_SUFFIX
from seed_multimodal.language.vocabulary import ImageVocabulary

Codes = list[list[list[int]] | None]  # of each picture its views; None: an optional picture that could not be read
Parsed = tuple[dict[str, Any], list[Picture]]


@dataclass(frozen=True)
class Kind:
    """One kind of records.

    Args:
        parse: (sample, settings, keys by what they hold) -> what the record is made of, and its pictures.
        record: (what `parse` gave, codes of the pictures, vocabulary) -> the record.
        fields: keys of the input by what they hold; `ask`: a fixed question, `suffix`: put behind each question.
        presets: other such mappings by name; `default` is merged unless a preset is named.
        views: whether several views of a picture can be written.
    """

    name: str
    parse: Callable[[Sample, InputSettings, Mapping[str, str]], Parsed]
    record: Callable[[dict[str, Any], Codes, ImageVocabulary], dict[str, Any]]
    fields: dict[str, str]
    presets: dict[str, dict[str, str]] = field(default_factory=dict)
    default: str = ""
    views: bool = False

    def keys(self, given: str | Mapping[str, str], where: str = "fields") -> dict[str, str]:
        """The keys in force: a preset by name, or a mapping over the kind's own.

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


def one(codes: list[list[int]] | None) -> list[int]:
    """The codes of a picture that must be there: of the picture itself, its first view."""
    assert codes is not None
    return codes[0]


def flat(codes: Codes) -> list[int]:
    """The codes of pictures one after the other."""
    return [code for picture in codes for code in one(picture)]


# ---- caption


def _parse_caption(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    data = sample.picture_member()
    value = data if data is not None else sample.fields.get(keys["image"])
    if value is None:
        raise Dropped("no picture")
    key = settings.caption_key_in_metadata if settings.use_caption_in_metadata else keys["caption"]
    text = None if settings.use_caption_in_metadata else sample.text_member()
    if text is None:
        several = sample.fields.get(key)
        is_list = isinstance(several, list) and several and all(isinstance(one, str) for one in several)
        text = several if is_list else sample.text(key, required=False)  # the decoder draws one of several
    if text is None:
        raise Dropped("no text")
    metadata = sample.fields if data is not None else {
        key: sample.fields[key] for key in ("image_id", "id") if key in sample.fields}
    return {"text": text, "metadata": metadata}, [sample.picture(value)]


def _caption(parsed: dict[str, Any], codes: Codes, vocabulary: ImageVocabulary) -> dict[str, Any]:
    return {"image_ids": one(codes[0]), **_views(codes), **parsed}


def _views(codes: Codes) -> dict[str, Any]:
    """`views` where a record's one picture has several."""
    return {"views": codes[0]} if len(codes) == 1 and len(codes[0] or ()) > 1 else {}


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
    value: Any = sample.picture_member()
    value = value if value is not None else sample.fields.get(keys["image"])
    several = value if isinstance(value, list) else [value]
    if not several:
        raise BadRecord("missing key", f"{sample.where}: its list of pictures is empty.")
    return texts, [sample.picture(picture, read=len(several) == 1) for picture in several]


def _parse_video(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    answer, question = sample.text(keys["answer"]), _question(sample, keys, required=False)
    texts = {"answer": answer} if question is None else {"question": question, "answer": answer}
    return texts, frames(sample, str(sample.text(keys["video"])), settings.num_frames)


def _flat(parsed: dict[str, Any], codes: Codes, vocabulary: ImageVocabulary) -> dict[str, Any]:
    return {"image_ids": flat(codes), **_views(codes), **parsed}


# ---- edit, story


def _parse_edit(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    texts = {name: sample.text(keys[name], required=False) for name in ("instruction", "instruction_gpt", "response")}
    found = {name: text for name, text in texts.items() if text is not None}
    if "instruction" not in found and not {"instruction_gpt", "response"} <= found.keys():
        raise BadRecord("missing key", f"{sample.where}: has no text under {keys['instruction']!r}, nor under both "
                        f"{keys['instruction_gpt']!r} and {keys['response']!r}.")
    return found, [sample.picture(sample.fields.get(keys["source"])),
                   sample.picture(sample.fields.get(keys["target"]), read=False)]


def _edit(parsed: dict[str, Any], codes: Codes, vocabulary: ImageVocabulary) -> dict[str, Any]:
    return {"source_image_ids": one(codes[0]), "target_image_ids": one(codes[1]), **parsed}


def _parse_story(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> Parsed:
    pictures, captions = (_listed(sample, keys[name], settings.num_images) for name in ("images", "captions"))
    wanted = settings.num_images if settings.num_images is not None else max(2, len(pictures))
    if len(pictures) != wanted or len(captions) != wanted:
        keys_there = "" if pictures and captions else f" ({sample.keys()})"
        raise BadRecord("images and captions", f"{sample.where}: {counted(len(pictures), 'picture')} under "
                        f"{keys['images']!r} and {counted(len(captions), 'caption')} under {keys['captions']!r} "
                        f"where {wanted} of each belong{keys_there}.")
    if not all(isinstance(text, str) for text in captions):
        raise BadRecord("wrong type", f"{sample.where}: one of its {keys['captions']!r} is no text.")
    return {"captions": captions}, [sample.picture(picture) for picture in pictures]


def _listed(sample: Sample, key: str, count: int | None) -> list[Any]:
    """The list under a key, or what stands under key0, key1, … (with the plural's s left out).

    Of those one more than wanted is looked for, so that a story that is too long is not cut unnoticed.
    """
    if isinstance(sample.fields.get(key), list):
        return list(sample.fields[key])
    found: list[Any] = []
    while f"{key.removesuffix('s')}{len(found)}" in sample.fields and len(found) <= (count or 1000):
        found.append(sample.fields[f"{key.removesuffix('s')}{len(found)}"])
    return found


def _story(parsed: dict[str, Any], codes: Codes, vocabulary: ImageVocabulary) -> dict[str, Any]:
    return {"image_ids": flat(codes), **{f"caption{n}": text for n, text in enumerate(parsed["captions"])}}


_QA = {"image": "image", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
_VIDEO = {"video": "video", "question": "question", "answer": "answer", "ask": "", "suffix": ""}
KINDS = {kind.name: kind for kind in (
    Kind("caption", _parse_caption, _caption, {"image": "image", "caption": "caption"}, views=True),
    # The released tool reads JourneyDB as it stands; its other variants were comments in the source.
    Kind("qa", _parse_qa, _flat, _QA, {
        "journeydb": {"ask": DESCRIBE_PROMPT, "answer": "caption"}, "describe": {"ask": DESCRIBE_PROMPT},
        "vqa": {"suffix": QA_SUFFIX}, "plain": {}}, default="journeydb", views=True),
    Kind("video", _parse_video, _flat, _VIDEO, {
        "plain": {}, "caption": {"question": "", "answer": "caption"}, "qa": {"suffix": QA_SUFFIX},
        "describe": {"ask": DESCRIBE_VIDEO_PROMPT, "answer": "caption"}}),
    Kind("edit", _parse_edit, _edit, {
        "source": "source_image", "target": "target_image", "instruction": "instruction",
        "instruction_gpt": "instruction_gpt", "response": "response"}),
    Kind("story", _parse_story, _story, {"images": "images", "captions": "captions"}),
    Kind("interleaved", parse_document, document_record, DOCUMENT_FIELDS),
    Kind("chat", parse_conversation, conversation_record, {}, views=True),
)}
