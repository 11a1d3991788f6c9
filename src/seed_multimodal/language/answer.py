"""Parsing an answer: generated ids → texts and images in order, any number of images.

An image is `least_codes` to `tokens_per_image` codes between `<img>` and `</img>` (which may be missing where their
number is free); anything else that looks like one becomes a `BrokenImagePart`, and the rest is parsed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary


@dataclass(frozen=True)
class TextPart:
    """Words of the answer, decoded without special tokens."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A whole image: its codes, all inside the codebook (of SEED-X the numbers of its places), and where in the
    generated ids the first of them stands."""

    codes: list[int]
    place: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True)
class BrokenImagePart:
    """Image words that are no image: the ids as generated (brackets included) and one sentence why."""

    ids: list[int]
    reason: str


AnswerPart = TextPart | ImagePart | BrokenImagePart


def split_answer(ids: Sequence[int], tokenizer: MultimodalTokenizer) -> list[AnswerPart]:
    """Cut generated ids (without the prompt) into parts, up to the first `</s>`; white space alone is dropped."""
    vocabulary = tokenizer.vocabulary
    ids = [int(id) for id in ids]
    if tokenizer.eos_id in ids:
        ids = ids[:ids.index(tokenizer.eos_id)]
    parts: list[AnswerPart] = []
    place = 0
    while place < len(ids):
        start = place
        if vocabulary.is_image_word(ids[place]):
            place = _image_end(ids, start, vocabulary)
            parts.append(_image_part(ids[start:place], vocabulary, start))
            continue
        while place < len(ids) and not vocabulary.is_image_word(ids[place]):
            place += 1
        text = tokenizer.decode(ids[start:place], skip_special_tokens=True)
        if text.strip():
            parts.append(TextPart(text))
    return parts


def _image_end(ids: list[int], start: int, vocabulary: ImageVocabulary) -> int:
    """Where the run of image words that begins at `start` ends (exclusive): after `<img>` at the next `</img>`, if one
    comes before another `<img>` (texts inside belong to the broken image); otherwise at the end of the codes."""
    place = start + 1
    if ids[start] == vocabulary.eoi_id:
        return place
    if ids[start] == vocabulary.boi_id:
        bracket = next((end for end in range(place, len(ids)) if ids[end] in (vocabulary.boi_id, vocabulary.eoi_id)), 0)
        if bracket and ids[bracket] == vocabulary.eoi_id:
            return bracket + 1
    while place < len(ids) and vocabulary.is_code_id(ids[place]):
        place += 1
    return place


def _image_part(ids: list[int], vocabulary: ImageVocabulary, start: int) -> ImagePart | BrokenImagePart:
    least, wanted = vocabulary.least_codes, vocabulary.tokens_per_image
    opened, closed = ids[0] == vocabulary.boi_id, ids[-1] == vocabulary.eoi_id
    inside = [id for id in ids[int(opened):len(ids) - int(closed)] if not vocabulary.counts_for_nothing(id)]
    if not opened:
        return BrokenImagePart(ids, "Image words without an opening <img>.")
    if not closed and least == wanted:
        return BrokenImagePart(ids, f"An image broke off after {len(inside)} of {wanted} codes.")
    if not all(vocabulary.is_code_id(id) for id in inside):
        return BrokenImagePart(ids, "An image holds words that are no image codes.")
    if not least <= len(inside) <= wanted:
        return BrokenImagePart(ids, f"An image has {len(inside)} codes instead of {wanted}.")
    codes = vocabulary.id_to_code(inside)
    if vocabulary.in_order and codes != list(range(wanted)):
        return BrokenImagePart(ids, "The words of an image are not in their order.")
    return ImagePart(codes, place=start + 1)
