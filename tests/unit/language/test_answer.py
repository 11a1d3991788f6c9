"""Answers as parts: texts and images in order, broken images with their reasons."""

from __future__ import annotations

from seed_multimodal.language.answer import AnswerPart, AnswerReader, BrokenImagePart, ImagePart
from seed_multimodal.language.tokenizer import MultimodalTokenizer

CODES = [1, 2, 3, 4, 5]


def split_answer(ids: list[int], tokenizer: MultimodalTokenizer) -> list[AnswerPart]:
    return AnswerReader(tokenizer).read_all(ids).parts


def test_read_all_of_texts_and_images(tokenizer: MultimodalTokenizer):
    ids = tokenizer.encode_parts(["Here is one.", CODES, "And another:", CODES[::-1], CODES]) + [
        2,
        0,
        0,
        17,
    ]
    assert split_answer(ids, tokenizer) == [
        "Here is one.",
        ImagePart(CODES),
        "And another:",
        ImagePart(CODES[::-1]),
        ImagePart(CODES),
    ]
    assert split_answer([], tokenizer) == split_answer([2], tokenizer) == []
    assert split_answer([*tokenizer.encode(" \n "), 2], tokenizer) == []


def test_read_all_of_broken_images(tokenizer: MultimodalTokenizer):
    vocabulary = tokenizer.vocabulary
    boi = vocabulary.boi_id
    eoi = vocabulary.eoi_id
    code = vocabulary.n_text
    text = tokenizer.encode("after")
    good = vocabulary.image_ids(CODES)
    cases = [
        ([boi, code, code, eoi], "2 codes instead of 5"),
        ([boi, eoi], "0 codes instead of 5"),
        ([boi, *[code] * 6, eoi], "6 codes instead of 5"),
        ([boi, code, 17, code, code, code, eoi], "other words"),
        ([code, code], "without an opening"),
        ([eoi], "without an opening"),
        ([boi], "broke off after 0 of 5"),
        ([boi, code, code], "broke off after 2 of 5"),
    ]
    for ids, reason in cases:
        for before in ([], text):
            parts = split_answer([*before, *ids, *good], tokenizer)
            broken = [part for part in parts if isinstance(part, BrokenImagePart)]
            assert len(broken) == 1 and broken[0].ids == ids and reason in broken[0].reason, reason
            assert parts[-1] == ImagePart(CODES) and len(parts) == 2 + bool(before)
    parts = split_answer([boi, code, *text], tokenizer)
    assert isinstance(parts[0], BrokenImagePart) and parts[1] == "after"
