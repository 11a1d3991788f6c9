"""Captions → word pieces for stage 1's text path: where the YAML's `text_tokenizer` is looked for."""

from __future__ import annotations

from pathlib import Path

from seed_lavis.options import locate
from seed_multimodal.language.words import BertWords, PieceWords, open_words


def caption_words(source: str, max_length: int) -> BertWords | PieceWords:
    """The tokenizer that `source` (folder or hub id) holds, as in training padded to `max_length`.

    Raises:
        CheckpointError: nothing there; the sentence names what to put where.
    """
    place, beside = locate(source), locate(f"pretrained/{source}")
    return open_words(beside if not Path(place).exists() and Path(beside).is_dir() else place, max_length)
