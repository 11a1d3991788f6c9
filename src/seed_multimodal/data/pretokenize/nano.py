"""Nano's world as input: the records that its own language model is trained on (`data.nano.records`), with pictures
that are drawn where they are encoded.

    format: nano
    content: edits          # of the split `train`, the first `number` of the stream `seed`

A record has the keys of every kind that can be made of it: questions are `qa` or `chat`, edits `edit` or `chat`,
stories `story` or `chat`, documents `interleaved`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.nano import EPOCH, Drawing
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.nano.records import from_last_picture, record_at, with_pictures
from seed_multimodal.data.nano.splits import check_split
from seed_multimodal.data.nano.sprites import load_sprites
from seed_multimodal.data.pretokenize.input_settings import InputSettings

KINDS = {"qa": "questions"}  # contents whose records have another name


class NanoContent:
    """Records of one content and split by number.

    Raises:
        DataError: an unknown split, or no drawings in the folder.
    """

    def __init__(self, folder: str | Path, settings: InputSettings) -> None:
        check_split(settings.split)
        load_sprites(folder)  # before workers are forked
        self.path, self._settings = Path(folder), settings

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one piece."""
        return [self._settings.number or EPOCH]

    def locate(self, row: int) -> Record:
        """Record number `row`, its pictures not drawn."""
        given = self._settings
        made = record_at(KINDS.get(given.content, given.content), given.seed, row, given.split)
        name = f"{given.split} {given.content} {given.seed} {row}"
        fields = _fields(with_pictures(made, lambda scene: Drawing(scene, folder=self.path)), given.content)
        return Record(name, f"{self.path}: {name}", fields, file=str(self.path))


def _fields(made: Mapping[str, Any], content: str) -> dict[str, Any]:
    if content == "captions":
        return {"image": made["image_ids"], "caption": made["text"]}
    if content == "documents":
        return {"images": made["image_ids"], "texts": made["texts"]}
    asked, answered = (message["content"] for message in from_last_picture(made)[:2])
    fields = {"messages": [{"role": message["role"], "content": [
        {"image": part} if isinstance(part, Drawing) else part for part in message["content"]]}
        for message in made["messages"]]}
    if content == "qa":
        fields |= {"image": asked[0], "question": asked[1], "answer": answered[0]}
    elif content == "edits":
        fields |= {"source_image": asked[0], "instruction": asked[1], "target_image": answered[1]}
    elif content == "stories":
        fields |= {"images": answered[1::2], "captions": answered[::2]}
    return fields
