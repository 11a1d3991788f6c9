"""Records whose pictures are not tokenised yet, read by the very code of the tool that will take them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from seed_multimodal.data.formats.pairs import PairReader
from seed_multimodal.data.formats.record import FileReader, Record
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.kinds import KINDS, get_kind
from seed_multimodal.data.pretokenize.pictures import Picture
from seed_multimodal.data.pretokenize.samples import Sample
from seed_multimodal.images.io import open_image
from seed_multimodal.settings import check_keys

LLM, TOKENIZER, ALONE = "llm", "tokenizer", "pictures"
PAIRS = (TOKENIZER, ALONE)  # read as pairs, the second without captions
STAGES = (LLM, *PAIRS, *KINDS)
_CONVERSATIONS = ("messages", "conversations", "data")


class PictureReader:
    """Reads records as a stage does that looks at pictures.

    Args:
        root: folder of the pictures that records name; None: as the tools look for them.
        fields: as of the extraction tools; for pairs the keys `image`, `caption` and, of edits, `condition`.
        stage: one of `STAGES`, for which `fields` must be; None: guessed from each record.
    """

    def __init__(self, root: str | None, fields: str | Mapping[str, str], stage: str | None) -> None:
        self._fields, self._guessed = fields, stage is None
        if stage in KINDS:
            get_kind(stage).keys(fields, "--fields")  # refused before anything is read
        elif not isinstance(fields, str):
            check_keys(fields, ("image", "caption", "condition"), "--fields")
        named = {} if isinstance(fields, str) else dict(fields)
        self._settings = InputSettings(image_root=root)
        self.pair = PairReader(root, named.get("image"), caption_key=named.get("caption"), captioned=stage != ALONE,
                               condition_key=named.get("condition"))

    def read(self, stage: str, record: Record, files: FileReader) -> list[Picture]:
        """The pictures of a record.

        Raises:
            DataError, ImageError: the stage would skip it. Dropped: it would leave it out.
        """
        if stage in PAIRS:
            pair = self.pair(record, files)
            return [Picture(pair.name, partial(open_image, one, name=pair.name))
                    for one in (pair.image, pair.condition) if one is not None]
        kind = get_kind(stage)
        preset = "plain" if self._guessed and "plain" in kind.presets else self._fields
        return kind.read(Sample(record, files, self._settings, kind.keys(preset)))[1]


def guess_stage(fields: Mapping[str, Any]) -> str:
    """The stage that a record with pictures is for, by its keys."""
    if any(isinstance(fields.get(key), list) for key in _CONVERSATIONS):
        return "chat"
    if "video" in fields:
        return "video"
    if isinstance(fields.get("images"), list):
        return "interleaved" if "texts" in fields or "instruction" in fields else "story"
    if "source_image" in fields or "target_image" in fields:
        return "edit"
    return "qa" if "question" in fields else TOKENIZER
