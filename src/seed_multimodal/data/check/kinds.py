"""What kind of record something is, by its keys; and the pictures in it, tokenised or as paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TEXTS = ("text", "caption", "question", "answer", "instruction", "instruction_gpt", "outputs",
         *(f"caption{n}" for n in range(5)), *(f"instruction{n}" for n in range(3)))
CODES = ("image_ids", "source_image_ids", "target_image_ids")
PATHS = ("image", "images", "source_image", "target_image")


@dataclass(frozen=True)
class Kind:
    """Records of one decoder: the keys they need. `pictures`: how many stand in a flat `image_ids` (0: any number)."""

    decoder: str
    needs: tuple[str, ...]
    pictures: int = 1

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """The needed keys that are not there; `views` may stand for `image_ids`, the polite pair for `instruction`."""
        absent = [key for key in self.needs if fields.get(key) is None]
        if "views" in fields:
            absent = [key for key in absent if key != "image_ids"]
        if {"instruction_gpt", "response"} <= fields.keys() and self.decoder == "sft.edit":
            absent = [key for key in absent if key != "instruction"]
        return absent


# In the order of guessing: the first whose keys are all there.
KINDS = (
    Kind("chat", ("messages",), 0),
    Kind("sft.edit", ("source_image_ids", "target_image_ids", "instruction")),
    Kind("sft.story", ("image_ids", *(f"caption{n}" for n in range(5))), 5),
    Kind("sft.multi_edit", ("image_ids", *(f"instruction{n}" for n in range(3))), 4),
    Kind("pretrain.retrieval", ("image_ids", "text", "context")),
    Kind("pretrain.interleaved", ("image_ids", "texts"), 0),
    Kind("sft.visual_question", ("image_ids", "data"), 0),
    Kind("sft.visual_question", ("image_ids", "instruction", "outputs"), 0),
    Kind("sft.conversation", ("image_ids", "question", "answer")),
    Kind("sft.video", ("image_ids", "question", "answer"), 0),
    Kind("sft.qa", ("image_ids", "question", "answer")),
    Kind("pretrain.video", ("image_ids", "answer"), 0),
    Kind("pretrain.caption", ("image_ids", "text")),
    Kind("sft.interleaved", ("instruction", "response")),
    Kind("sft.text_conversation", ("data",)),
    Kind("pretrain.text", ("text",)),
)
# Same keys as a kind above, so never guessed.
OTHERS = (Kind("sft.difference", ("image_ids", "question", "answer"), 2),
          Kind("sft.video_conversation", ("image_ids", "question", "answer"), 0),
          Kind("pretrain.edit", ("source_image_ids", "target_image_ids", "instruction")),
          Kind("pretrain.visual_question", ("image_ids",), 0),
          Kind("pretrain.text_conversation", ("data",)),
          Kind("pretrain.caption_eval", ("image_ids", "context", "metadata")))
RAW = Kind("", (), 0)  # pictures not yet tokenised, or keys of no known kind


def guess_kind(fields: Mapping[str, Any], tokens_per_image: int = 0) -> Kind | None:
    """The kind of a record (`tokens_per_image` 0: not known); `RAW` for pictures with texts that are still to be
    tokenised, None for unknown keys."""
    if "messages" not in fields and _raw(fields):
        return RAW
    for kind in KINDS:
        if kind.missing(fields):
            continue
        if kind.decoder == "sft.conversation" and not _marked(fields):
            continue
        if kind.decoder in ("sft.conversation", "sft.video") and tokens_per_image:
            several = len(_flat(fields.get("image_ids"))) > tokens_per_image
            if several != (kind.decoder == "sft.video"):
                continue
        elif kind.decoder == "sft.video":
            continue  # how many pictures it is cannot be told
        return kind
    return None


def kind_of_decoder(name: str) -> Kind:
    """What a decoder needs; one without an entry needs nothing that is known here."""
    return next((kind for kind in (*KINDS, *OTHERS) if kind.decoder == name), Kind(name, (), 0))


def code_lists(fields: Mapping[str, Any], kind: Kind) -> Iterator[tuple[str, Any, int]]:
    """(name, codes, how many pictures they must be; 0: any number) of everything tokenised in a record."""
    if "messages" in fields:
        for turn, message in enumerate(fields["messages"], 1):
            for part in message["content"]:
                if isinstance(part, dict) and "codes" in part:
                    codes = part["codes"]
                    views = isinstance(codes, list) and bool(codes) and isinstance(codes[0], list)
                    yield from ((f"turn {turn}", one, 1) for one in (codes if views else [codes]))
        return
    for key in CODES:
        value = fields.get(key)
        if value is None:
            continue
        if isinstance(value, list) and any(one is None or isinstance(one, list) for one in value):
            yield from ((f"{key}[{place}]", one, 1) for place, one in enumerate(value) if one is not None)
        else:
            yield key, value, kind.pictures
    for place, one in enumerate(fields["views"] if isinstance(fields.get("views"), list) else []):
        yield f"views[{place}]", one, 1
    for place, one in enumerate(fields["context"] if isinstance(fields.get("context"), list) else []):
        if isinstance(one, dict) and one.get("image_ids") is not None:
            yield f"context[{place}].image_ids", one["image_ids"], 1


def image_paths(fields: Mapping[str, Any]) -> list[str]:
    """Paths of the pictures of a record that are not tokenised yet."""
    if "messages" in fields:
        found = [part["image"] for message in fields["messages"] for part in message["content"]
                 if isinstance(part, dict) and "image" in part]
    elif any(key in fields for key in (*CODES, "views")):
        return []  # where the codes came from
    else:
        found = []
        for key in PATHS:
            value = fields.get(key)
            found += value if isinstance(value, list) else [value]
    return [path for path in found if isinstance(path, str) and path]


def as_tokenised(fields: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The fields with codes in place of pictures that are still files: enough for the length."""
    if "messages" not in fields:
        return fields
    turns = [{**turn, "content": [{"codes": [0] * tokens} if isinstance(part, dict) and "image" in part else part
                                  for part in turn["content"]]} for turn in fields["messages"]]
    return fields | {"messages": turns}


def _raw(fields: Mapping[str, Any]) -> bool:
    return not any(key in fields for key in (*CODES, "views")) and any(fields.get(key) for key in PATHS)


def _marked(fields: Mapping[str, Any]) -> bool:
    return "Question: " in str(fields["question"]) and "Answer: " in str(fields["answer"])


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return []
    if not any(isinstance(one, list) for one in value):
        return value
    return [code for one in value if isinstance(one, list) for code in one]
