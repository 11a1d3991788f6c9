"""The pictures and texts in a record of any kind: codes, paths of pictures that are not tokenised yet, texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seed_multimodal.data.decoders.base import CODE_FIELDS, Decoder
from seed_multimodal.data.formats.images import IMAGE_KEYS, PICTURE_ENDINGS

PICTURES = ("image", "images", "video", "source_image", "target_image", *IMAGE_KEYS)
# Of records whose pictures are not tokenised yet, whatever they will become.
RAW_TEXTS = ("text", "caption", "question", "answer", "instruction", "instruction_gpt", "outputs",
             *(f"caption{number}" for number in range(5)), *(f"instruction{number}" for number in range(3)))


def is_raw(fields: Mapping[str, Any]) -> bool:
    """Whether a record has pictures, and none of them is tokenised yet (in conversations, that is no other kind)."""
    return ("messages" not in fields and not any(key in fields for key in (*CODE_FIELDS, "views"))
            and (any(fields.get(key) for key in PICTURES)
                 or str(fields.get("file_name")).lower().endswith(PICTURE_ENDINGS)))


def code_lists(fields: Mapping[str, Any], decoder: type[Decoder] | None) -> Iterator[tuple[str, Any, int]]:
    """(name, codes, how many pictures they must be; 0: any number) of everything tokenised in a record."""
    if "messages" in fields:
        for turn, message in enumerate(fields["messages"], 1):
            for part in message["content"]:
                if isinstance(part, dict) and "codes" in part:
                    codes = part["codes"]
                    views = isinstance(codes, list) and bool(codes) and isinstance(codes[0], list)
                    yield from ((f"turn {turn}", one, 1) for one in (codes if views else [codes]))
        return
    for key in CODE_FIELDS:
        value = fields.get(key)
        if value is None:
            continue
        if isinstance(value, list) and any(one is None or isinstance(one, list) for one in value):
            yield from ((f"{key}[{place}]", one, 1) for place, one in enumerate(value) if one is not None)
        else:
            yield key, value, 1 if key != "image_ids" else decoder.pictures_in(fields) if decoder else 0
    for place, one in enumerate(fields["views"] if isinstance(fields.get("views"), list) else []):
        yield f"views[{place}]", one, 1
    for place, one in enumerate(fields["context"] if isinstance(fields.get("context"), list) else []):
        if isinstance(one, dict) and one.get("image_ids") is not None:
            yield f"context[{place}].image_ids", one["image_ids"], 1


def has_pictures(fields: Mapping[str, Any]) -> bool:
    """Whether a conversation has pictures that are not tokenised yet."""
    return any(isinstance(part, dict) and "image" in part
               for message in fields.get("messages", ()) for part in message["content"])


def as_tokenised(fields: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The fields with codes in place of pictures that are still files: enough for the length."""
    if "messages" not in fields:
        return fields
    turns = [{**turn, "content": [{"codes": [0] * tokens} if isinstance(part, dict) and "image" in part else part
                                  for part in turn["content"]]} for turn in fields["messages"]]
    return fields | {"messages": turns}
