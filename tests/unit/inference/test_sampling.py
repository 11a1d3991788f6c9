"""Which token comes next: whatever the scores, images are well-formed in every family; guidance,
penalties and random numbers are those of transformers."""

import copy
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from yaml_tables import read_tables

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.inference.sampling import (
    ImageConstraints,
    Sampler,
    build_warpers,
    read_answer,
    refuse_damaged,
)
from seed_multimodal.language.answer import AnswerReader, BrokenImagePart, ImagePart
from seed_multimodal.language.vocabulary import ImageGrammar, ImageVocabulary

EVENTS = {"text": str, "image": ImagePart, "image_broken": BrokenImagePart}
PADDING = 3  # rows of the output layer behind the vocabulary
FAMILIES = ("tokenizer", "seedx_tokenizer", "lavit_tokenizer")


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer_of_family(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def vocabulary(tokenizer_of_family) -> ImageVocabulary:
    return tokenizer_of_family.vocabulary


def constraints(vocabulary: ImageVocabulary, **options) -> ImageConstraints:
    return ImageConstraints([ImageGrammar(vocabulary, **options)])


def allowed(vocabulary: ImageVocabulary, ids: list[int], budget: int | None) -> set[int]:
    """The grammar of an answer, in words: what may follow `ids`."""
    starts = [index for index, id in enumerate(ids) if id == vocabulary.boi_id]
    in_image = bool(starts) and vocabulary.eoi_id not in ids[starts[-1] :]
    codes = range(vocabulary.code_start, vocabulary.code_start + vocabulary.n_codes)
    if not in_image:
        # Text, or an image where a whole one fits.
        tokens = set(range(vocabulary.size)) - set(codes) - {vocabulary.eoi_id}
        tokens -= {vocabulary.added_tokens.get(name) for name in ("<patch>", "</patch>")}
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


@pytest.mark.slow
def test_all_short_answers_follow_the_grammar(tokenizer_of_family):
    # The reader and the constraints must agree on what an image is: else one draws what the other
    # calls broken. SEED-X's images get zeros: they are certain, and untrained scores must not cost
    # a beam.
    tokenizer = copy.copy(tokenizer_of_family)
    fixed = tokenizer.vocabulary.fixed_image_order
    vocabulary = replace(tokenizer.vocabulary, tokens_per_image=1 if fixed else 2)
    tokenizer.vocabulary = vocabulary
    lavit = vocabulary.image_only_when_forced
    image = re.compile("bc{1,2}e?" if lavit else "bce" if fixed else "bcce")
    ids_of = {
        "t": tokenizer.encode("a")[-1],
        "b": vocabulary.boi_id,
        "c": vocabulary.code_start,
        "e": vocabulary.eoi_id,
        "s": tokenizer.eos_token_id,
    }
    scores = torch.randn(1, vocabulary.size + PADDING)
    processes = {budget: constraints(vocabulary, budget=budget) for budget in (None, 5)}
    for letters in itertools.chain(*(itertools.product(ids_of, repeat=n) for n in range(7))):
        # 1. Texts, and images, which may be broken.
        ids = [ids_of[letter] for letter in letters]
        answer = "".join(letters)
        if lavit:  # it skips starts and stops in images
            answer = re.sub("b[^e]*", lambda begun: f"b{re.sub('[bs]', '', begun[0])}", answer)
        expected = []
        for piece in re.findall("b[tc]*e|bc*|t+|c+|e", answer.split("s")[0]):
            kind = ImagePart if image.fullmatch(piece) else BrokenImagePart
            expected.append(str if piece[0] == "t" else kind)
        reader = AnswerReader(tokenizer)
        events = [event for id in ids for event in reader.read(id)] + reader.close()
        assert [type(part) for part in reader.parts] == expected, letters
        assert lavit or reader.ids == ids[: (*letters, "s").index("s") + 1]

        # What a page has shown while it streamed is what the answer holds.
        streamed = [EVENTS[event["type"]] for event in events if event["type"] != "image_start"]
        pairs = zip([None, *streamed], streamed, strict=False)
        assert [kind for last, kind in pairs if (last, kind) != (str, str)] == expected, letters
        for part in reader.parts:
            if isinstance(part, ImagePart):
                codes = vocabulary.code_to_id(part.codes)
                assert [reader.ids[position] for position in part.positions] == codes

        # 2. What may follow.
        for budget, process in processes.items():
            grammar = ImageGrammar(vocabulary, budget, initial_ids=ids)
            grammar.length = len(ids)
            follows = allowed(vocabulary, ids, budget)
            assert all(grammar.allows(id) == (id in follows) for id in ids_of.values()), letters
            if len(ids) < 4:
                after = process(torch.tensor([ids], dtype=torch.long), scores)[0]
                kept = torch.isfinite(after)
                assert set(kept.nonzero().flatten().tolist()) == follows, letters
                is_certain = fixed and ids_of["t"] not in follows  # in an image
                assert torch.equal(after[kept], scores[0, kept] * (not is_certain))


def test_an_image_that_may_not_be_drawn_ends_the_answer(tokenizer):
    # Without it the model continues where it has learned none: words that mean nothing.
    vocabulary = tokenizer.vocabulary
    end = tokenizer.eos_token_id
    scores = torch.randn(1, vocabulary.size)
    before = scores[0].exp()
    process = constraints(vocabulary, budget=0, end_id=end)
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
    process = constraints(vocabulary, original=True)
    scores = torch.randn(1, vocabulary.size)

    def finite(*ids):
        allowed = process(torch.tensor([ids], dtype=torch.long), scores)[0]
        return set(torch.isfinite(allowed).nonzero().flatten().tolist())

    start = vocabulary.code_start
    image_codes = range(start, start + vocabulary.tokens_per_image)
    assert finite() == set(range(vocabulary.size)) - {*image_codes, vocabulary.eoi_id}
    assert finite(vocabulary.boi_id) == {start}


# ---- scores

SCORES = [1.0, 2.0, 4.0, -1.0]
OTHERS = [0.0, 3.0, 0.5, 0.0]
END = 2  # also the likeliest one
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def running(*rows, ids=(), forced=(), seed=None, **settings) -> SimpleNamespace:
    """What a sampler reads of a running answer, with the scores of its rows."""
    return SimpleNamespace(
        rows=[SimpleNamespace(scores=torch.tensor(row)) for row in rows or [SCORES]],
        ids=list(ids),
        end_ids=[END],
        settings=GenerationSettings(constrain=False, **{**OFF, **settings}),
        request=SimpleNamespace(forced_ids=forced),
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )


def log_softmax(*scores: float) -> torch.Tensor:
    return torch.tensor(scores).log_softmax(-1)


@pytest.mark.parametrize("options, expected", read_tables(__file__))
def test_distributions_of_settings(options, expected):
    # The other answer of a batch, which is long enough, keeps its scores.
    sequences = [running(**options), running(**{**options, "ids": [0, 0]})]
    scores = torch.tensor([SCORES, SCORES])
    rows = Sampler().distributions(sequences, scores)
    assert rows[0].tolist() == expected
    if "min_new_tokens" in options:
        assert rows[1].tolist() == SCORES
    assert scores.tolist() == [SCORES, SCORES]  # those of the model stay


def test_choose_the_likeliest_or_forced_token():
    answers = [running(), running(OTHERS)]
    first, second = Sampler().choose(answers)
    assert (first.id, second.id) == (END, 1)
    assert first.log_prob == pytest.approx(float(log_softmax(*SCORES)[END]))
    assert first.is_likeliest and first.is_sound
    [forced] = Sampler().choose([running(ids=[2], forced=[2, 3])])
    assert forced[:3] == (3, pytest.approx(float(log_softmax(*SCORES)[3])), False)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_choose_with_guidance(guidance):
    # Drawings of LaVIT are guided away from those without a caption.
    with_text, without = log_softmax(*SCORES), log_softmax(*OTHERS)
    expected = without + guidance * (with_text - without)
    [chosen] = Sampler().choose([running(SCORES, OTHERS, guidance=guidance)])
    assert chosen.id == int(expected.argmax())
    assert chosen.log_prob == pytest.approx(float(expected.log_softmax(-1)[chosen.id]))


def test_choose_samples_as_torch_does():
    # Seeds of earlier versions and of transformers draw the same tokens.
    sampler = Sampler()
    for seed in range(20):
        [chosen] = sampler.choose([running(seed=seed, temperature=3.0)])
        probabilities = (torch.tensor(SCORES) / 3).softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        assert chosen.id == int(torch.multinomial(probabilities, 1, generator=generator))


def test_damaged_scores_are_noticed():
    # NaN compares as nothing does: some token would be chosen.
    broken = [torch.nan, *SCORES[1:]]
    sound, damaged = Sampler().choose([running(), running(broken)])
    assert (sound.is_sound, damaged.is_sound) == (True, False)
    ids = torch.zeros(2, 0)
    scores = torch.tensor([SCORES, SCORES])
    assert refuse_damaged(ids, scores) is scores
    for row in (broken, [-torch.inf] * 4):
        with pytest.raises(GenerationError, match="not numbers"):
            refuse_damaged(ids, torch.tensor([SCORES, row]))


def test_settings_that_are_off_warp_nothing():
    assert build_warpers(*OFF.values()) == []
    assert len(build_warpers(0.5, 1, 0.9)) == 3


@pytest.mark.parametrize("stop_after", ["", "fox:", "dog"])
def test_events_of_a_text_are_its_part(tokenizer, stop_after):
    # Also what stands before the text behind which stops count: a verdict.
    reader = AnswerReader(tokenizer, ["!"], stop_after=stop_after)
    events = [event for id in tokenizer.encode("a fox: a dog!") for event in reader.read(id)]
    events += reader.close()
    assert "".join(event["text"] for event in events) == reader.parts[0]
    assert reader.parts[0].strip() == "a fox: a dog"


def test_read_answer_ends_at_a_stop(tokenizer):
    ids = tokenizer.encode("a fox: a dog")
    for options, text in (({}, "a fox"), ({"stop_after": "dog"}, "a fox: a dog")):
        answer = read_answer(tokenizer, ids, GenerationSettings(stop=(":",), **options))
        assert "".join(map(str, answer.parts)).strip() == text
