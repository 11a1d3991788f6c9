"""Conversations in any known format -> `messages`: LLaVA's JSON, SEED-X's JSONL, chat lists.

    fields["messages"] = [{"role": "user" | "assistant", "content": [part, ...]}, ...]
    part = "text" | {"codes": [12, 7, ...]} | {"image": "a.jpg"}
           | {"codes": [[...], [...]]} (views of one image)

| format | images | position of an image |
| --- | --- | --- |
| `conversations: [{from, value}]` (LLaVA) | `image`, or `image_ids` if tokenized | each `<image>` |
| `messages: [{role, content}]` | in `content`, or as above, or `images` | there or each `<image>` |
| `data: [question, answer, ...]` (SEED-X) | `image` | each `<image>`, else before the question |
| `source_image`, `target_image`, `instruction` (SEED-X) | these | input first, target last |

Other fields stay unchanged; a system message goes to `fields["system"]`. Records of other kinds are
returned as is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from seed_multimodal.language.vocabulary import PLACEHOLDER

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}
ROLE_ORDER = ("user", "assistant")
NO_IMAGE = (None, "", "none", "None", "null")
ContentPart = str | JsonObject  # a text, or `{"codes": …}`, `{"image": …}`
Turn = tuple[str, list[ContentPart]]  # role and content


def with_messages(item: RecordFields, location: str) -> JsonObject:
    """The fields of a record, with `messages` if it is a conversation.

    Raises BadRecord: a turn lacks role or text, roles do not alternate, or the number of `<image>`
    placeholders differs from the number of images.
    """
    fields = dict(item)
    if fields.keys().isdisjoint(("messages", "conversations", "data", "source_image")):
        return fields

    # 1. The turns, with placeholders of images.
    _parse_json_texts(fields, location)
    turns = _find_turns(fields, location)
    if turns is None:
        if _is_edit(fields):
            fields["messages"] = _edit_messages(fields, location)
        return fields

    # 2. Their images, at the placeholders.
    images: list[ContentPart] = []
    parts = list(chain.from_iterable(content for _, content in turns))
    texts = [part for part in parts if isinstance(part, str)]
    n_placeholders = sum(text.count(PLACEHOLDER) for text in texts)
    if n_placeholders or len(texts) == len(parts):
        # Else images are in the turns, and a field `image` only names their source.
        images = _field_images(fields, n_placeholders, location)
    if "data" in fields and not n_placeholders:
        _, first_question = turns[0]
        first_question[:0] = [PLACEHOLDER] * len(images)
        n_placeholders = len(images)
    if n_placeholders != len(images):
        raise BadRecord(
            "images and placeholders",
            f"{location}: {pluralize(n_placeholders, f'{PLACEHOLDER} placeholder')} for "
            f"{pluralize(len(images), 'image')}.",
        )
    remaining = iter(images)
    turns = [(role, _insert_images(content, remaining)) for role, content in turns]

    # 3. The system message, then question and answer in turn.
    if turns and turns[0][0] == "system":
        _, content = turns.pop(0)
        fields["system"] = "".join(part for part in content if isinstance(part, str))
    _check_order(turns, location)
    fields["messages"] = [{"role": role, "content": content} for role, content in turns]
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
    """The turns of a conversation in one of the formats of lists; None: it is none."""
    for key in ("messages", "conversations"):
        if key in fields:
            return _read_turns(fields[key], key, location)
    # SEED-X's alternating texts; other data sets have fields of this name, too.
    data = fields.get("data")
    if "image_ids" in fields or not isinstance(data, list) or not data or len(data) % 2:
        return None
    if not all(isinstance(text, str) for text in data):
        return None
    return [(ROLE_ORDER[index % 2], [text]) for index, text in enumerate(data)]


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
        content = turn.get("content")
        if content is None:
            content = turn.get("value")
        parts = [content] if isinstance(content, str) else _list(content, turn_location)
        converted.append((role, [_convert_part(part, turn_location) for part in parts]))
    return converted


def _convert_part(part: object, location: str) -> ContentPart:
    """A part of a turn, converted from a chat API's form (`{"type": "text", "text": …}`)."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        if part.get("codes") is not None:
            return {"codes": _list(part["codes"], location)}
        if part.get("text") is not None:
            return str(part["text"])
        # `{"image_url": {"url": …}}` of a chat API.
        image = part.get("image")
        if image is None:
            image = part.get("image_url")
        if isinstance(image, Mapping):
            image = image.get("url", image)
        if image not in NO_IMAGE:
            return {"image": image}
        if part.get("type") == "image":  # its image is in `images`
            return PLACEHOLDER
    raise BadRecord(
        "missing key", f"{location}: a part has neither text, 'codes' nor 'image': {shorten(part)}."
    )


def _is_edit(fields: RecordFields) -> bool:
    """Whether it is an edit whose images are not tokenized; tables have empty columns."""
    if not {"source_image", "target_image"} <= fields.keys():
        return False
    return fields.get("source_image_ids") is None and fields.get("target_image_ids") is None


def _edit_messages(fields: RecordFields, location: str) -> list[JsonObject]:
    """An edit as a question with the source image, and an answer with the target image."""
    # Rewritten texts replace the instruction only together.
    instruction = fields.get("instruction")
    response: list[str] = []
    if fields.get("instruction_new") is not None and fields.get("response") is not None:
        instruction = fields["instruction_new"]
        response = [fields["response"]] if fields["response"] else []
    if not isinstance(instruction, str):
        raise BadRecord(
            "missing key", f"{location}: 'instruction' must be a text, not {shorten(instruction)}."
        )
    return [
        {"role": "user", "content": [{"image": fields["source_image"]}, instruction]},
        {"role": "assistant", "content": [*response, {"image": fields["target_image"]}]},
    ]


def _field_images(fields: RecordFields, n_placeholders: int, location: str) -> list[ContentPart]:
    """The images outside the turns, which replace the placeholders, in order."""
    codes = fields.get("image_ids")
    if codes is not None:
        codes = _list(codes, f"{location}: 'image_ids'")
        if codes and not isinstance(codes[0], list):
            # One flat list, of equal numbers of codes for each image.
            size = -(-len(codes) // max(1, n_placeholders))
            codes = [codes[start : start + size] for start in range(0, len(codes), size)]
        return [{"codes": image_codes} for image_codes in codes]

    # Paths or contents.
    images = fields.get("images")
    if images is None:
        images = fields.get("image")
    return [{"image": image} for image in as_list(images) if _is_image(image)]


def _is_image(value: object) -> bool:
    return isinstance(value, Mapping | bytes) or value not in NO_IMAGE


def _insert_images(
    content: Sequence[ContentPart], images: Iterator[ContentPart]
) -> list[ContentPart]:
    """The parts of a turn with its images; empty texts are dropped."""
    parts: list[ContentPart] = []
    for part in content:
        if not isinstance(part, str):
            parts.append(part)
            continue
        # Each placeholder takes the next image.
        first_text, *texts = part.split(PLACEHOLDER)
        parts.append(first_text)
        for text in texts:
            parts += [next(images), text]
    return [part for part in parts if part != ""]


def _check_order(turns: Sequence[Turn], location: str) -> None:
    """Raise BadRecord unless questions and answers that are not empty alternate."""
    for index, (role, content) in enumerate(turns):
        if role != ROLE_ORDER[index % 2]:
            raise BadRecord(
                "wrong role",
                f"{location}: turn {index + 1} is the {role}'s; user and assistant alternate.",
            )
        if all(isinstance(part, str) and not part.strip() for part in content):
            raise BadRecord("empty text", f"{location}: turn {index + 1} (the {role}'s) is empty.")
    if len(turns) % 2 or not turns:
        raise BadRecord("wrong role", f"{location}: the conversation ends without an answer.")


def _list(value: object, location: str) -> list[FieldValue]:
    if not isinstance(value, list | tuple):
        raise BadRecord("wrong type", f"{location}: {shorten(value)} is not a list.")
    return list(value)
