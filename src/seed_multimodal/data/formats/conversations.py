"""Conversations in any known format -> `messages`: LLaVA's JSON, SEED-X's JSONL, chat lists with roles.

    fields["messages"] = [{"role": "user" | "assistant", "content": [part, ...]}, ...]
    part = "text" | {"codes": [12, 7, ...]} | {"codes": [[...], [...]]} (views of one image) | {"image": "a.jpg"}

| format | images | place of an image |
| --- | --- | --- |
| `conversations: [{from, value}]` (LLaVA) | `image`, or `image_ids` if tokenized | each `<image>` |
| `messages: [{role, content}]` | parts of `content`, or `images` / `image` / `image_ids` | there or each `<image>` |
| `data: [question, answer, ...]` (SEED-X) | `image` | each `<image>`, else before the first question |
| `source_image`, `target_image`, `instruction` (SEED-X) | these | read first, drawn last |

Other fields stay unchanged; a system message goes to `fields["system"]`. Records of other kinds are returned as is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, parse_json, shorten
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
NO_IMAGE = (None, "", "none", "None", "null")
Part = str | dict[str, Any]


def with_messages(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a record, with `messages` if it is a conversation. Raises BadRecord: a turn lacks role or text,
    roles do not alternate, or the number of `<image>` placeholders differs from the number of images."""
    fields = dict(item)
    if fields.keys().isdisjoint(("messages", "conversations", "data", "source_image")):
        return fields
    for key in ("messages", "conversations", "data"):
        # Parquet tables often store them as JSON text; a `data` that is no list is another field, such as a date.
        if isinstance(fields.get(key), str) and (
            key != "data" or fields[key].lstrip().startswith("[")
        ):
            fields[key] = parse_json(fields[key], f"{where}: {key!r}")
    if "messages" in fields or "conversations" in fields:
        key = "messages" if "messages" in fields else "conversations"
        turns = _turns(fields[key], key, where)
    elif (
        "image_ids" not in fields
        and isinstance(fields.get("data"), list)
        and fields["data"]
        and len(fields["data"]) % 2 == 0
        and all(isinstance(text, str) for text in fields["data"])
    ):
        turns = [
            ("assistant" if number % 2 else "user", [text])
            for number, text in enumerate(fields["data"])
        ]
    elif {"source_image", "target_image"} <= fields.keys() and all(  # tables have empty columns
        fields.get(f"{key}_ids") is None for key in ("source_image", "target_image")
    ):
        fields["messages"] = _edit(fields, where)
        return fields
    else:
        return fields
    placed = any(not isinstance(part, str) for _, content in turns for part in content)
    # With images in the turns, a field `image` only names their source.
    images = [] if placed and not _placeholders(turns) else _images(fields, turns, where)
    if images and "data" in fields and not _placeholders(turns):
        turns[0][1][:0] = [PLACEHOLDER] * len(images)
    count, left = _placeholders(turns), iter(images)
    if count != len(images):
        raise BadRecord(
            "images and placeholders",
            f"{where}: {pluralize(count, f'{PLACEHOLDER} placeholder')} for "
            f"{pluralize(len(images), 'image')}.",
        )
    turns = [(role, _with_images(content, left)) for role, content in turns]
    if turns and turns[0][0] == "system":
        fields["system"] = "".join(part for part in turns.pop(0)[1] if isinstance(part, str))
    _check_order(turns, where)
    fields["messages"] = [{"role": role, "content": content} for role, content in turns]
    return fields


def _turns(value: Any, key: str, where: str) -> list[tuple[str, list[Part]]]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(turn, Mapping) for turn in value)
    ):
        raise BadRecord(
            "wrong type", f"{where}: {key!r} must be a list of turns, not {shorten(value)}."
        )
    turns = []
    for number, turn in enumerate(value, 1):
        name, author = f"{where}: turn {number} of {key!r}", turn.get("role") or turn.get("from")
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        role = ROLES.get(str(author).lower())
        if role is None:
            raise BadRecord(
                "wrong role",
                f"{name}: its role is {shorten(author)}, not one of {', '.join(ROLES)}.",
            )
        parts = [content] if isinstance(content, str) else _list(content, name)
        turns.append((role, [_part(part, name) for part in parts]))
    return turns


def _part(part: Any, name: str) -> Part:
    """A part of a turn, converted from a chat API's form (`{"type": "text", "text": …}`)."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        if part.get("codes") is not None:
            return {"codes": _list(part["codes"], name)}
        if part.get("text") is not None:
            return str(part["text"])
        image = part.get("image_url") if part.get("image") is None else part["image"]
        image = image.get("url", image) if isinstance(image, Mapping) else image
        if image not in NO_IMAGE:
            return {"image": image}
        if part.get("type") == "image":  # its image is in `images`
            return PLACEHOLDER
    raise BadRecord(
        "missing key", f"{name}: a part has neither text, 'codes' nor 'image': {shorten(part)}."
    )


def _edit(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    given = fields.get("instruction_new") is not None and fields.get("response") is not None
    instruction = fields["instruction_new"] if given else fields.get("instruction")
    if not isinstance(instruction, str):
        raise BadRecord(
            "missing key", f"{where}: 'instruction' must be a text, not {shorten(instruction)}."
        )
    response = [fields["response"]] if given and fields["response"] else []
    return [
        {"role": "user", "content": [{"image": fields["source_image"]}, instruction]},
        {"role": "assistant", "content": [*response, {"image": fields["target_image"]}]},
    ]


def _images(
    fields: Mapping[str, Any], turns: Sequence[tuple[str, list[Part]]], where: str
) -> list[Part]:
    """The images that replace the placeholders, in order."""
    codes = fields.get("image_ids")
    if codes is not None:
        codes = _list(codes, f"{where}: 'image_ids'")
        if not codes or isinstance(codes[0], list):
            return [{"codes": one} for one in codes]
        count = max(1, _placeholders(turns))  # images in a flat list
        size = -(-len(codes) // count)
        return [{"codes": codes[start : start + size]} for start in range(0, len(codes), size)]
    images = fields.get("images") if fields.get("images") is not None else fields.get("image")
    several = images if isinstance(images, list) else [images]
    return [
        {"image": image}
        for image in several
        if isinstance(image, Mapping | bytes) or image not in NO_IMAGE
    ]


def _placeholders(turns: Sequence[tuple[str, list[Part]]]) -> int:
    return sum(
        part.count(PLACEHOLDER) for _, content in turns for part in content if isinstance(part, str)
    )


def _with_images(content: Sequence[Part], images: Iterator[Part]) -> list[Part]:
    """The parts of a turn with its images; empty texts are dropped."""
    parts: list[Part] = []
    for part in content:
        if not isinstance(part, str):
            parts.append(part)
            continue
        first, *others = part.split(PLACEHOLDER)
        parts.append(first)
        for text in others:
            parts += [next(images), text]
    return [part for part in parts if part != ""]


def _check_order(turns: Sequence[tuple[str, list[Part]]], where: str) -> None:
    for number, (role, content) in enumerate(turns):
        if role != ("assistant" if number % 2 else "user"):
            raise BadRecord(
                "wrong role",
                f"{where}: turn {number + 1} is the {role}'s; user and assistant alternate.",
            )
        if all(isinstance(part, str) and not part.strip() for part in content):
            raise BadRecord("empty text", f"{where}: turn {number + 1} (the {role}'s) is empty.")
    if len(turns) % 2 or not turns:
        raise BadRecord("wrong role", f"{where}: the conversation ends without an answer.")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadRecord("wrong type", f"{name}: {shorten(value)} is not a list.")
    return list(value)
