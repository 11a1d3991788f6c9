"""Image constraints: whatever the scores, generated images are well-formed in every family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seed_multimodal.inference.sampling import ImageConstraints
from seed_multimodal.language.vocabulary import ImageVocabulary

PADDING = 3  # rows of the output layer behind the vocabulary
FAMILIES = ("tokenizer", "seedx_tokenizer", "lavit_tokenizer")


@pytest.fixture(scope="module", params=FAMILIES)
def vocabulary(request) -> ImageVocabulary:
    return request.getfixturevalue(request.param).vocabulary


def allowed(vocabulary: ImageVocabulary, ids: list[int], budget: int | None) -> set[int]:
    """The grammar of an answer, in words: what may follow `ids`."""
    starts = [index for index, id in enumerate(ids) if id == vocabulary.boi_id]
    in_image = bool(starts) and vocabulary.eoi_id not in ids[starts[-1] :]
    codes = range(vocabulary.code_start, vocabulary.code_start + vocabulary.n_codes)
    if not in_image:
        # Text, or an image where a whole one fits.
        tokens = set(range(vocabulary.size)) - set(codes) - {vocabulary.eoi_id}
        tokens -= set(range(vocabulary.size)[vocabulary.input_only_ids])
        fits = budget is not None and budget - len(ids) >= vocabulary.tokens_per_image + 2
        if vocabulary.image_only_when_forced or not fits:
            tokens.discard(vocabulary.boi_id)
        if budget is None and not vocabulary.image_only_when_forced:
            tokens.add(vocabulary.boi_id)
        return tokens
    # LaVIT's images may hold skipped tokens, as the original's.
    tokens = {id for id in range(vocabulary.size) if vocabulary.is_ignored_in_image(id)}
    count = len(ids) - 1 - starts[-1]
    if count >= vocabulary.min_codes:
        tokens.add(vocabulary.eoi_id)
    if count < vocabulary.tokens_per_image:
        tokens |= {codes[count]} if vocabulary.fixed_image_order else set(codes)
    return tokens


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), budget=st.none() | st.integers(1, 40), opened=st.booleans())
def test_any_sequence_follows_the_grammar(vocabulary, seed, budget, opened):
    # One token too many allowed, and the answer's image cannot be decoded; one too few, and the
    # model cannot say what it was trained to. SEED-X's images get zeros: they are certain, and
    # untrained scores must not cost a beam.
    generator = torch.Generator().manual_seed(seed)
    process = ImageConstraints(vocabulary, opened=opened, budget=budget)
    rows = torch.zeros(2, 0, dtype=torch.long)
    prefix = [vocabulary.boi_id] if opened else []
    for _ in range(budget or 20):
        scores = torch.randn(2, vocabulary.size + PADDING, generator=generator)
        scores[:, [vocabulary.boi_id, vocabulary.eoi_id]] += 4  # images are rare otherwise
        processed = process(rows, scores)
        for ids, before, after in zip(rows.tolist(), scores, processed, strict=True):
            # A forced `<img>` is not part of the budget.
            total = None if budget is None else budget + len(prefix)
            kept = torch.isfinite(after)
            expected = allowed(vocabulary, prefix + ids, total)
            assert set(kept.nonzero().flatten().tolist()) == expected
            is_certain = vocabulary.fixed_image_order and 0 not in expected  # in an image
            assert torch.equal(after[kept], before[kept] * (not is_certain))
        chosen = processed.softmax(-1).multinomial(1, generator=generator)
        rows = torch.cat([rows, chosen], dim=1)


def test_an_image_that_may_not_be_drawn_ends_the_answer(tokenizer):
    # Without it the model continues where it has learned none: words that mean nothing.
    vocabulary = tokenizer.vocabulary
    end = tokenizer.eos_token_id
    scores = torch.randn(1, vocabulary.size)
    before = scores[0].exp()
    process = ImageConstraints(vocabulary, budget=0, end_id=end)
    empty = process(torch.zeros(1, 0, dtype=torch.long), scores)[0].exp()
    assert empty[end] == before[end] and empty[vocabulary.boi_id] == 0  # it has a text
    after = process(torch.tensor([[5]]), scores)[0].exp()
    torch.testing.assert_close(after[end], before[end] + before[vocabulary.boi_id])
    assert after[vocabulary.boi_id] == 0
    others = [id for id in allowed(vocabulary, [5], 0) if id != end]
    assert torch.equal(after[others], before[others])


def test_original_constraints_of_seed_x(seedx_tokenizer):
    # The original forbids only an image's own codes, patches and starts: answers as by its scripts.
    vocabulary = seedx_tokenizer.vocabulary
    process = ImageConstraints(vocabulary, original=True)
    scores = torch.randn(1, vocabulary.size)

    def finite(*ids):
        allowed = process(torch.tensor([ids], dtype=torch.long), scores)[0]
        return set(torch.isfinite(allowed).nonzero().flatten().tolist())

    start = vocabulary.code_start
    image_codes = range(start, start + vocabulary.tokens_per_image)
    assert finite() == set(range(vocabulary.size)) - {*image_codes, vocabulary.eoi_id}
    assert finite(vocabulary.boi_id) == {start}
