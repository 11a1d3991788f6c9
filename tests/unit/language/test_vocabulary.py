"""Ids of image words, and refusals of codes that are none."""

from __future__ import annotations

import pytest

from seed_multimodal.errors import CodesError
from seed_multimodal.language.vocabulary import ImageVocabulary, code_token


def test_vocabulary_of_the_released_sizes() -> None:
    words = ImageVocabulary()
    assert (words.boi_id, words.eoi_id, words.size, words.image_length) == (40192, 40193, 40194, 34)
    assert words.code_to_id([0, 8191]) == [32000, 40191] and words.id_to_code([32000, 40191]) == [0, 8191]
    assert [words.is_code_id(i) for i in (31999, 32000, 40191, 40192)] == [False, True, True, False]
    assert (code_token(12), code_token(8191)) == ("<img_00012>", "<img_08191>")


def test_image_ids_and_image_text() -> None:
    words = ImageVocabulary(n_text=100, n_codes=8, tokens_per_image=3)
    assert words.image_ids([7, 0, 2]) == [108, 107, 100, 102, 109]
    assert words.image_text([7]) == "<img><img_00007></img>"


@pytest.mark.parametrize(("codes", "message"), [
    ([1, 2], "3 codes, not 2"), ([1, 2, 3, 4], "3 codes, not 4"), ([1, 2, 8], "code 8 at place 2"),
    ([-1, 0, 0], "code -1 at place 0")])
def test_image_ids_of_wrong_codes(codes: list[int], message: str) -> None:
    with pytest.raises(CodesError, match=message):
        ImageVocabulary(n_text=100, n_codes=8, tokens_per_image=3).image_ids(codes)
