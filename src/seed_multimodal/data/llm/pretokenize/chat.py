"""Conversations of any spelling (`data.formats.conversations`) as `messages` whose pictures are codes.

With several views, pictures of the user get all of them (a decoder draws one); pictures of the assistant, which the
model learns to draw, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.llm.pretokenize.samples import IMAGE_KEYS, Picture, Sample
from seed_multimodal.data.llm.pretokenize.settings import InputSettings
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import ImageVocabulary


def parse(sample: Sample, settings: InputSettings, keys: Mapping[str, str]) -> tuple[dict[str, Any], list[Picture]]:
    """Messages with `{"picture": n}` where the n-th picture stands.

    Raises:
        BadRecord: no conversation, or one that `with_messages` refuses.
    """
    fields = sample.fields
    data = sample.member(*IMAGE_KEYS)
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


def record(parsed: dict[str, Any], codes: list[list[list[int]] | None], vocabulary: ImageVocabulary) -> dict[str, Any]:
    """The record of what `parse` gave."""

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
