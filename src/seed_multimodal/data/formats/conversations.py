"""Conversations in any known format -> `messages`: LLaVA's JSON, SEED-X's JSONL, chat lists.

    fields["messages"] = [{"role": "user" | "assistant", "content": [part, ...]}, ...]
    part = "text" | {"codes": [12, 7, ...]} | {"image": "a.jpg"}
           | {"codes": [[...], [...]]} (views of one image)

| format | images | position of an image |
| --- | --- | --- |
| `conversations: [{from, value}]` (LLaVA) | `image`, or `image_ids` if tokenized | placeholders |
| `messages: [{role, content}]` | in `content`, or as above, or `images` | there or placeholders |
| `texts: [{user, assistant}]` (the_cauldron) | `images` | placeholders, else first |
| `data: [question, answer, ...]` (SEED-X) | `image` | placeholders, else first |
| `source_image`, `target_image`, `instruction` (SEED-X) | these | input first, target last |

Placeholders have any spelling of `_MARKUP`. Turns in another order are repaired as by LLaVA's and
FastChat's readers, and `fields[REPAIRED]` says how. Other fields stay unchanged; a system message
goes to `fields["system"]`. Records of other kinds are returned as is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    JsonObject,
    RecordFields,
    as_list,
    parse_json,
    shorten,
)
from seed_multimodal.errors import pluralize
from seed_multimodal.language.prompts import merge_text

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
ROLE_ORDER = ("user", "assistant")
NO_IMAGE = (None, "", "none", "None", "null")
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # fields
ContentPart = str | JsonObject  # a text, or `{"codes": …}`, `{"image": …}`

REPAIRED = "repaired turns"  # field: how the turns were repaired, as text
NO_QUESTION = "an answer without a question was left out"
NO_ANSWER = "a question without an answer was left out"
JOINED = "neighbouring turns of one author were joined"

# Markup of an image: `<image>`, `<image1>`, `<|image_1|>`, `<ImageHere>`, `[IMG]`, …; a path in it
# (Qwen-VL), or the names of SEED's codes; with the marks that some models put around it.
_SUFFIX = "here|content|placeholder|token|pad|soft_token|context"
_NAME = f"(?:image|img)(?:_?(?:{_SUFFIX}))?|start_of_image"
_PAIR = r"<(?P<tag>image|img)>(?P<content>(?:<\w+>)+|[^<>\n]*)</(?P=tag)>"
_TAG = rf"<\|?(?:{_NAME})[ _:-]?(?P<number>[0-9]*)\|? ?/?>"
_BRACKETS = r"(?-i:\[(?:IMG|IMAGE)[ _-]?(?P<bracketed>[0-9]*)\])"
_BORDER = "(?:<[|]?(?:im|image|vision)_(?:start|end)[|]?>|<fake_token_around_image>)?"
_MARKUP = re.compile(f"{_BORDER}(?:{_PAIR}|{_TAG}|{_BRACKETS}){_BORDER}", re.IGNORECASE)
_CODE = re.compile("<img_([0-9]+)>")


@dataclass(frozen=True)
class Placeholder:
    """The place of an image; `number`: which one; None: the next one."""

    text: str
    number: int | None = None


RawPart = ContentPart | Placeholder
Turn = tuple[str, list[RawPart]]  # role and content


def with_messages(item: RecordFields, location: str) -> JsonObject:
    """The fields of a record, with `messages` if it is a conversation.

    Raises BadRecord: a turn lacks role or text, no question has an answer, there are more or fewer
    placeholders than images, or other media.
    """
    fields = dict(item)
    if fields.keys().isdisjoint(("messages", "conversations", "texts", "data", "source_image")):
        return fields

    # 1. The turns, with placeholders of images.
    _parse_json_texts(fields, location)
    turns = _find_turns(fields, location)
    if turns is None:
        return fields
    for name in OTHER_MEDIA:
        if fields.get(name):
            raise BadRecord("other media", f"{location}: has {name!r}; only images are read.")

    # 2. Their images; turns that are left out in the next step take theirs along.
    _place_images(turns, fields, location)

    # 3. The system message, then question and answer in turn.
    system, turns, repairs = _repaired(turns, location)
    if system:
        fields["system"] = system
    if repairs:
        fields[REPAIRED] = ", ".join(repairs)
    fields["messages"] = [{"role": role, "content": merge_text(parts)} for role, parts in turns]
    return fields


def _parse_json_texts(fields: JsonObject, location: str) -> None:
    """Parse turns that are stored as JSON text, as often in parquet tables."""
    for key in ("messages", "conversations", "data"):
        value = fields.get(key)
        if not isinstance(value, str):
            continue
        # A `data` that is no list is another field, such as a date.
        if key != "data" or value.lstrip().startswith("["):
            fields[key] = parse_json(value, f"{location}: {key!r}")


def _find_turns(fields: RecordFields, location: str) -> list[Turn] | None:
    """The turns of a conversation in one of the formats; None: it is none."""
    for key in ("messages", "conversations"):
        if fields.get(key) is not None:
            return _read_turns(fields[key], key, location)
    if _is_edit(fields):
        return _edit_turns(fields, location)

    # Question and answer in turn; other data sets have fields of these names, too.
    pairs = fields.get("texts")
    texts = fields.get("data")
    if isinstance(pairs, list) and pairs and all(map(_is_pair, pairs)):
        texts = [text for pair in pairs for text in (pair["user"], pair["assistant"])]
    if "image_ids" in fields or not isinstance(texts, list) or len(texts) < 2:
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    return [(ROLE_ORDER[index % 2], split_images(text)) for index, text in enumerate(texts)]


def _is_pair(value: object) -> bool:
    """Whether it is a question with its answer (the_cauldron)."""
    return isinstance(value, Mapping) and {"user", "assistant"} <= value.keys()


def _read_turns(turns: FieldValue, key: str, location: str) -> list[Turn]:
    """The turns under `key`, with role names and parts of content in our form."""
    all_objects = isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)
    if not all_objects or not turns:
        raise BadRecord(
            "wrong type", f"{location}: {key!r} must be a list of turns, not {shorten(turns)}."
        )
    converted: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        turn_location = f"{location}: turn {number} of {key!r}"
        # LLaVA's keys are `from` and `value`, a chat API's `role` and `content`.
        author = turn.get("role") or turn.get("from")
        role = ROLES.get(str(author).lower())
        if role is None:
            raise BadRecord(
                "wrong role",
                f"{turn_location}: its role is {shorten(author)}, not one of {', '.join(ROLES)}.",
            )
        if role == "assistant" and turn.get("weight") == 0:  # in OpenAI's lists
            message = "has weight 0, but each answer is learned; leave the conversation out"
            raise BadRecord("unlearned answer", f"{turn_location}: {message}.")
        content = turn.get("content")
        if content is None:
            content = turn.get("value")
        parts: list[RawPart] = []
        for part in [content] if isinstance(content, str) else _list(content, turn_location):
            parts += _read_part(part, turn_location)
        converted.append((role, parts))
    return converted


def _read_part(part: object, location: str) -> list[RawPart]:
    """A part of a turn, converted from a chat API's form (`{"type": "text", "text": …}`)."""
    if isinstance(part, str):
        return split_images(part)
    if isinstance(part, Mapping):
        kind = str(part.get("type") or "")
        if part.get("codes") is not None:
            return [{"codes": _list(part["codes"], location)}]
        if "text" in kind or (not kind and part.get("text") is not None):
            return split_images(str(part.get("text") or ""))
        # The image itself, in one of the forms of chat APIs, or its place.
        for key in ("image", "image_url", "url", "path", "base64", "source"):
            image = part.get(key)
            if isinstance(image, Mapping):
                image = image.get("url") or image.get("data") or image
            if image not in NO_IMAGE and (not kind or "image" in kind):
                return [{"image": image}]
        if "image" in kind:
            index = part.get("index")
            return [Placeholder(shorten(part), index if isinstance(index, int) else None)]
    raise BadRecord(
        "missing key", f"{location}: a part has neither text, 'codes' nor 'image': {shorten(part)}."
    )


def split_images(text: str) -> list[RawPart]:
    """A text as texts with an image or a placeholder between them."""
    parts: list[RawPart] = []
    start = 0
    for match in _MARKUP.finditer(text):
        parts.append(text[start : match.start()])
        start = match.end()
        number = match["number"] or match["bracketed"]
        content = match["content"] or ""
        codes = _CODE.findall(content)
        if codes:
            parts.append({"codes": [int(code) for code in codes]})
        elif content.strip("./ ") and "<" not in content:  # `./`: MiniCPM's
            parts.append({"image": content.strip()})
        else:
            parts.append(Placeholder(match[0], int(number) if number else None))
    return [*parts, text[start:]]


def _is_edit(fields: RecordFields) -> bool:
    """Whether it is an edit whose images are not tokenized; tables have empty columns."""
    if not {"source_image", "target_image"} <= fields.keys():
        return False
    return fields.get("source_image_ids") is None and fields.get("target_image_ids") is None


def _edit_turns(fields: RecordFields, location: str) -> list[Turn]:
    """An edit as a question with the source image, and an answer with the target image."""
    # Rewritten texts replace the instruction only together.
    instruction = fields.get("instruction")
    response = ""
    if fields.get("instruction_new") is not None and fields.get("response") is not None:
        instruction = fields["instruction_new"]
        response = fields["response"]
    if not isinstance(instruction, str):
        raise BadRecord(
            "missing key", f"{location}: 'instruction' must be a text, not {shorten(instruction)}."
        )
    question: list[RawPart] = [{"image": fields["source_image"]}]
    first_text, *others = split_images(instruction)
    # A placeholder is the source's.
    question = [first_text, *question, *others[1:]] if others else [*question, first_text]
    return [("user", question), ("assistant", [response, {"image": fields["target_image"]}])]


def _place_images(turns: Sequence[Turn], fields: RecordFields, location: str) -> None:
    """Put the images of other fields into the turns."""
    # 1. Where images are in the turns, a field `image` only names their source.
    parts = list(chain.from_iterable(content for _, content in turns))
    placeholders = [part for part in parts if isinstance(part, Placeholder)]
    numbers = [part.number for part in placeholders]
    written = {number for number in numbers if number is not None}
    if not placeholders and any(isinstance(part, Mapping) for part in parts):
        return
    images = _field_images(fields, len(written) or len(placeholders), location)
    if not placeholders and fields.keys().isdisjoint(("messages", "conversations")):
        turns[0][1][:0] = images
        return

    # 2. Placeholders take the next image, or that of their number, from 0 or 1 on.
    indices = [*range(len(numbers))]
    if written and None not in numbers and min(written) <= 1:
        indices = [number - min(written) for number in numbers if number is not None]
    if {*indices} != {*range(len(images))} or (written and None in numbers):
        names = ", ".join(dict.fromkeys(part.text for part in placeholders))
        raise BadRecord(
            "images and placeholders",
            f"{location}: {pluralize(len(placeholders), 'image placeholder')} "
            f"{f'({names}) ' if names else ''}for {pluralize(len(images), 'image')}.",
        )
    remaining = iter(indices)
    for _, content in turns:
        for index, part in enumerate(content):
            if isinstance(part, Placeholder):
                content[index] = images[next(remaining)]


def _field_images(fields: RecordFields, n_images: int, location: str) -> list[ContentPart]:
    """The images outside the turns; `n_images`: by the placeholders, to divide joined codes."""
    codes = fields.get("image_ids")
    if codes is not None:
        codes = _list(codes, f"{location}: 'image_ids'")
        if codes and not isinstance(codes[0], list):
            # One flat list, of equal numbers of codes for each image.
            size = -(-len(codes) // max(1, n_images))
            codes = [codes[start : start + size] for start in range(0, len(codes), size)]
        return [{"codes": image_codes} for image_codes in codes]

    # Paths or contents.
    images = fields.get("images") or fields.get("image")  # joined tables have empty columns
    return [{"image": image} for image in as_list(images) if image not in NO_IMAGE]


def _repaired(turns: Sequence[Turn], location: str) -> tuple[str, list[Turn], list[str]]:
    """The system message, questions and answers in turn, and what was repaired.

    Raises BadRecord: an empty turn, a later system message, or no question with an answer.
    """
    system: list[str] = []
    dialogue: list[Turn] = []
    repairs: list[str] = []
    for number, (role, content) in enumerate(turns, 1):
        turn_location = f"{location}: turn {number} (the {role}'s)"
        texts = [part for part in content if isinstance(part, str)]
        is_text = len(texts) == len(content)
        if role == "system":
            if not is_text or dialogue or repairs:
                reason = "a system message is text, before all other turns"
                raise BadRecord("wrong role", f"{turn_location}: {reason}.")
            system += texts
        elif is_text and not "".join(texts).strip():
            raise BadRecord("empty text", f"{turn_location} is empty.")
        elif dialogue and dialogue[-1][0] == role:
            dialogue[-1][1].extend(["\n", *content])
            repairs.append(JOINED)
        elif role == "user" or dialogue:
            dialogue.append((role, [*content]))
        else:
            repairs.append(NO_QUESTION)
    if dialogue and dialogue[-1][0] == "user":
        dialogue.pop()
        repairs.append(NO_ANSWER)
    if not dialogue:
        raise BadRecord("no answer", f"{location}: no question has an answer.")
    return "\n".join(system), dialogue, [*dict.fromkeys(repairs)]


def _list(value: object, location: str) -> list[FieldValue]:
    if not isinstance(value, list | tuple):
        raise BadRecord("wrong type", f"{location}: {shorten(value)} is not a list.")
    return list(value)
