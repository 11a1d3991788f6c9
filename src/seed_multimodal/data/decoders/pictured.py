"""Sequences with pictures as features (SEED-X): which pictures, in how many views, and where their words stand.

    read       <patch> 64 words </patch> for each part of the picture, <img> 64 words </img> for the whole
    written    <img> 64 words </img>; of these only <img> is learned as a word, the others' states are

The number of a picture's views depends on its size (`opened` says what pictures are). Texts may hold boxes
(`<box_start><loc-1>…<box_end>`); other control words in a text are refused, unless `validate` is off (the released
behaviour: they are taken as they are).
Source: SEED-X's released code (`sft_clm.py`, `image_text_pairs_clm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders.base import Draft, Span
from seed_multimodal.data.decoders.opened import OpenedDecoder, OpenedOptions, PictureSequence, UsedPicture
from seed_multimodal.data.decoders.sequence import IGNORED, TokenSequence, pad
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import BOX, BOX_END, PLACEHOLDER
from seed_multimodal.seed_x.processing import read_boxes, seed_x_words
from seed_multimodal.seed_x.views import RELEASED_GRIDS, choose_grid, read_grids
from seed_multimodal.settings import setting

INSTRUCTION = "{instruction}"


@dataclass(frozen=True)
class PictureOptions(OpenedOptions):
    """Options of these decoders, by their released names.

    Args:
        num_img_in_tokens, num_img_out_tokens: words of a view that is read, of a picture that is written; 0: the
            tokenizer's number.
        multi_resolution: pictures are cut into parts on one of `resolution_grids`; else they are read as a whole.
        base_resolution: side of a view in pixels.
    """

    num_img_in_tokens: int = setting(0, least=0)
    num_img_out_tokens: int = setting(0, least=0)
    multi_resolution: bool = True
    resolution_grids: tuple[str, ...] = RELEASED_GRIDS
    base_resolution: int = setting(448, least=1)
    instruction_prompt: str = "[INST] {instruction} [/INST]\n"
    system_message: str = ""
    min_resolution: int = setting(0, least=0)
    min_aspect_ratio: float = setting(0.0, least=0, most=1)

    def __post_init__(self) -> None:
        if INSTRUCTION not in self.instruction_prompt:
            raise ConfigError(f"instruction_prompt {self.instruction_prompt!r} has no {INSTRUCTION} to fill in.")
        read_grids(self.resolution_grids)


class PictureDecoder(OpenedDecoder):
    """Base of SEED-X's decoders."""

    Options = PictureOptions

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """See `Decoder`. Raises ConfigError also for a tokenizer of another system."""
        super().__init__(tokenizer, options)
        self.words = seed_x_words(tokenizer)
        self.grids = read_grids(self.options.resolution_grids)
        whole = self.words.tokens_per_image
        self.tokens_in = self.options.num_img_in_tokens or whole
        self.tokens_out = self.options.num_img_out_tokens or whole
        if max(self.tokens_in, self.tokens_out) > self.words.n_codes:
            raise ConfigError(f"decoder {self.name}: a picture cannot take {max(self.tokens_in, self.tokens_out)} "
                              f"words; the tokenizer has {self.words.n_codes}.")

    def use(self, fields: Mapping[str, Any], name: str, written: bool = False) -> UsedPicture:
        """The opened picture of a field on the grid that suits it."""
        return self.use_picture(fields.get(name), name, written)

    def use_picture(self, picture: Any, name: str, written: bool = False) -> UsedPicture:
        """See `use`."""
        self.check_picture(picture, name)
        sides = self.options.multi_resolution
        grid = choose_grid(picture.size, self.grids, self.options.base_resolution) if sides else None
        return UsedPicture(picture, grid, written)

    def misshapen(self, picture: UsedPicture, name: str) -> str:
        """Why the released filter leaves out a picture of this size; empty if it does not."""
        width, height = picture.picture.size
        least, ratio = self.options.min_resolution, self.options.min_aspect_ratio
        if min(width, height) < least:
            return f"{name}: fewer than {least} pixels on a side"
        if ratio and not ratio <= height / width <= 1 / ratio:
            return f"{name}: narrower than {ratio:g} to 1"
        return ""

    def said(self, text: str, name: str) -> str:
        """A text of the record. Raises BadRecord: it holds a malformed box, the name of another control word, or a
        placeholder where no picture stands."""
        if not self.validate:
            return text
        if PLACEHOLDER in text:
            raise BadRecord("images and placeholders", f"{name}: holds {PLACEHOLDER}, but no picture stands there.")
        hidden = {word for word in self.tokenizer.control_words(text) if not word.startswith(("<loc-", "<box_"))}
        if hidden:
            raise BadRecord("control word", f"{name}: holds the control word {min(hidden)!r}.")
        problems = read_boxes(text, grid=self.words.n_locations)[1] if BOX in text or BOX_END in text else []
        if problems:
            raise BadRecord("malformed box", f"{name}: {problems[0]}")
        return text

    def asked(self, text: str, name: str, shown: UsedPicture | None, before: bool) -> list[Any]:
        """The content of a user's turn: its text, and a picture in the place of its placeholder; without one `before`
        the text or behind it. Raises as `said`."""
        pieces = text.split(PLACEHOLDER) if shown is not None and self.validate else [text]
        if len(pieces) > 2:
            raise BadRecord("images and placeholders", f"{name}: {len(pieces) - 1} {PLACEHOLDER} placeholders for 1 "
                            "picture.")
        parts: list[Any] = [self.said(piece, name) for piece in pieces]
        if shown is not None:
            parts.insert(1 if len(pieces) == 2 or not before else 0, shown)
        return [part for part in parts if part != "" or len(pieces) == 1]

    def instruct(self, *content: Any, opening: str = "") -> Span:
        """A user's turn, not learned."""
        before, _, after = self.options.instruction_prompt.partition(INSTRUCTION)
        return Span([opening + before, *content, after], learned=False)

    def system(self) -> list[Span]:
        """What is said before everything."""
        message = self.options.system_message
        return [Span([message if message.endswith("\n") else f"{message}\n"], learned=False)] if message else []

    def _fill(self, sequence: TokenSequence, draft: Draft, max_length: int | None) -> None:
        assert isinstance(sequence, PictureSequence)
        sequence.ids, sequence.labels = [self.tokenizer.bos_id], [IGNORED]
        for span in draft.spans:
            self._add(sequence, span)
        sequence.ids.append(self.tokenizer.eos_id)
        sequence.labels.append(self.tokenizer.eos_id)

    def _add(self, sequence: PictureSequence, span: Span) -> None:
        parts: list[Any] = merge_text(list(span.parts))
        for place, part in enumerate(parts):
            start = len(sequence.ids)
            if isinstance(part, str):
                part = part.lstrip() if place else part
                ids = self.tokenizer.encode(part.rstrip() if place + 1 < len(parts) else part)
                labels = ids if span.learned else [IGNORED] * len(ids)
            else:
                sequence.pictures.append(part)
                ids = self.words.run(self.tokens_out) if part.written else (
                    list(self.words.read_ids(part.views, self.tokens_in)))
                labels = [id if part.written and id == self.words.boi_id else IGNORED for id in ids]
                inside = [start + n for n, id in enumerate(ids) if self.words.is_code_id(id)]
                (sequence.written if part.written else sequence.read).extend(inside)
            sequence.ids += ids
            sequence.labels += labels

    def as_text(self, parts: Sequence[Any]) -> str:
        """See `Decoder`."""
        return "".join(self.tokenizer_text(part) for part in parts)

    def tokenizer_text(self, part: Any) -> str:
        """A text, or a picture by the names of its words."""
        if isinstance(part, str):
            return part
        ids = self.words.run(self.tokens_out) if part.written else self.words.read_ids(part.views, self.tokens_in)
        return "".join(self.tokenizer.tokens(ids))


def batch_rows(sequences: Sequence[PictureSequence], max_length: int, pad_id: int) -> dict[str, Any]:
    """The released batch without its pixels, as lists: rows of `max_length`, and for every view of every picture in
    order `embeds_cmp_mask`, `embeds_gen_mask` and `patch_position`.

    Returns:
        also `images_patch_length` and `image_size` of each picture; all of these None where the batch has no picture.

    Raises:
        ValueError: a sequence longer than a row, which would lose places of features.
    """
    rows: dict[str, Any] = {}
    for sequence in sequences:
        if len(sequence) > max_length:
            raise ValueError(f"A sequence of {len(sequence)} tokens does not fit into rows of {max_length}.")
        row: dict[str, Any] = pad(sequence, max_length, pad_id)
        for name, places in (("ids_gen_mask", set(sequence.written)), ("ids_cmp_mask", set(sequence.read))):
            row[name] = [place in places for place in range(max_length)]
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    pictures = [picture for sequence in sequences for picture in sequence.pictures]
    views: dict[str, Any] = {
        "embeds_cmp_mask": [use for picture in pictures for use in picture.uses[0]],
        "embeds_gen_mask": [use for picture in pictures for use in picture.uses[1]],
        "patch_position": [place for picture in pictures for place in picture.positions],
        "images_patch_length": [picture.views for picture in pictures],
        "image_size": [list(picture.picture.size) for picture in pictures]}
    return {**rows, **(views if pictures else dict.fromkeys(views))}
