"""`Engine`: answers of parallel requests equal those of transformers' `generate` alone, for every
family.
"""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_generation import embeddings, generate
from waiting import wait_until

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.image_constraints import ImageConstraints, ImageLogitsProcessor
from seed_multimodal.inference.kv_cache import CPU_BYTES, KVCache, plan_cache
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt, PromptImage

GREEDY = GenerationSettings(max_new_tokens=30, do_sample=False)
WILD = GenerationSettings(max_new_tokens=30, temperature=3.0, top_p=0.9, top_k=0)
TEXTS = (
    "a",
    "What is this animal?",
    "Please draw a fish.",
    "no",
    "Where is the cat that was here?",
)
SEEDS = [5, 4, 3, 2, 1]


@pytest.fixture(params=("tiny", "tiny_x", "tiny_lavit"))
def system(request) -> Any:
    return request.getfixturevalue(request.param)


def engine_of(system: Any, max_rows: int = 16, **options: Any) -> Engine:
    return Engine(TorchBackend(system.llm, max_rows=max_rows, **options), system.tokenizer)


def wait_until_idle(engine: Engine) -> None:
    """Until the engine's thread has freed all rows."""

    def state() -> tuple[int, ...]:
        return (engine.n_running, engine.n_waiting, engine.n_active, engine.n_reserved)

    wait_until(lambda: state() == (0, 0, 0, 0))


def prompts(system: Any) -> list[Prompt]:
    """Prompts as ids and, every second one, as embeddings."""
    embed = system.llm.get_input_embeddings()
    mixed = []
    for row, text in enumerate(TEXTS):
        ids = system.tokenizer.encode_parts([text], add_bos=True)
        mixed.append(Prompt(ids) if row % 2 else Prompt.of_embeddings(embed(torch.tensor(ids))))
    return mixed


SETTINGS = {
    "greedy": GREEDY,
    "sampled": WILD,
    "sampled image": replace(WILD, force_image=True, max_new_tokens=70),
    "least number of tokens": replace(GREEDY, min_new_tokens=9),
    "repetition penalty": replace(WILD, repetition_penalty=1.5),
    "no constraints": replace(GREEDY, constrain=False),
    "2 beams": replace(GREEDY, num_beams=2),
    "LaVIT's beams": replace(
        GREEDY, num_beams=5, min_new_tokens=4, length_penalty=0.0, early_stopping=True
    ),
    "2 answers of 3 beams": replace(
        GREEDY, num_beams=3, num_return_sequences=2, length_penalty=2.0
    ),
    "beams of an image": replace(GREEDY, num_beams=3, force_image=True, max_new_tokens=70),
    "beams with a penalty": replace(GREEDY, num_beams=3, repetition_penalty=1.3),
    "sampled beams": replace(WILD, num_beams=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_generate_equals_transformers(system, settings):
    expected = generate(system.llm, system.tokenizer, prompts(system), settings, seeds=SEEDS)
    for max_rows in (5, 16):
        assert (
            engine_of(system, max_rows).generate(prompts(system), settings, seeds=SEEDS) == expected
        )


def test_submit_delivers_the_tokens_of_generate(tiny):
    engine = engine_of(tiny, 2)
    expected = engine.generate(prompts(tiny), WILD, seeds=SEEDS)
    requests = [
        engine.submit(prompt, WILD, seed=seed)
        for prompt, seed in zip(prompts(tiny), SEEDS, strict=True)
    ]
    assert [list(request) for request in requests] == expected
    reasons = ["stop" if ids[-1] == tiny.tokenizer.eos_token_id else "length" for ids in expected]
    assert [request.finish_reason for request in requests] == reasons


def test_generate_with_guidance(tiny_lavit):
    """With negative prompts of any length; equal to transformers' guidance."""
    tokenizer = tiny_lavit.tokenizer
    texts = ["a red apple", "two dogs run", "a fish"]
    boi = tokenizer.vocabulary.boi_id
    ends = [tokenizer.vocabulary.eoi_id]
    negatives = [None, [*tokenizer.text_ids("a blue fish"), boi], [boi]]
    inputs = [
        Prompt(tokenizer.text_ids(text), negative=negative)
        for text, negative in zip(texts, negatives, strict=True)
    ]
    settings = replace(GREEDY, guidance=1.7, force_image=True)
    engine = engine_of(tiny_lavit, 5)
    answers = engine.generate(inputs, settings, end_ids=ends)
    constraints = ImageConstraints(tokenizer.vocabulary)
    for prompt, ids in zip(inputs, answers, strict=True):
        start = torch.tensor([[*prompt.ids, boi]])
        plain = tiny_lavit.llm.generate(
            start,
            max_new_tokens=30,
            do_sample=False,
            guidance_scale=1.7,
            eos_token_id=ends[0],
            negative_prompt_ids=torch.tensor([prompt.negative or [boi]]),
            pad_token_id=0,
            logits_processor=[ImageLogitsProcessor(constraints, opened=True, budget=30)],
        )
        assert ids == [boi, *plain[0, start.shape[1] :].tolist()]
    assert (
        answers[0] != engine.generate(inputs[:1], replace(settings, guidance=1.0), end_ids=ends)[0]
    )


def test_beams_with_guidance_and_seeds_of_each_answer(tiny_lavit):
    """Guidance moves beams, too.

    Sampled beams have the seed of their request, alone or together.
    """
    tokenizer = tiny_lavit.tokenizer
    inputs = [Prompt(tokenizer.text_ids(text)) for text in ("a red apple", "two dogs run")]
    engine = engine_of(tiny_lavit, 12)
    beams = replace(GREEDY, num_beams=3, force_image=True)
    guided = engine.generate(inputs, replace(beams, guidance=4.0))
    assert guided != engine.generate(inputs, beams)
    assert [
        engine.generate([prompt], replace(beams, guidance=4.0))[0] for prompt in inputs
    ] == guided
    # With a single beam, beam search is greedy.
    single_beam = replace(GREEDY, guidance=4.0, force_image=True)
    assert engine.generate(inputs, single_beam) == engine.generate(
        inputs, replace(single_beam, num_beams=1)
    )

    sampled = replace(WILD, num_beams=2)
    together = engine.generate(inputs, sampled, seeds=[7, 8])
    alone = [
        engine.generate([prompt], sampled, seeds=[seed])[0]
        for prompt, seed in zip(inputs, (7, 8), strict=True)
    ]
    assert together == alone
    assert engine.generate(inputs[:1], sampled, seeds=[9])[0] != together[0]


def test_budget_of_each_beam_answer_is_its_own(tiny):
    """A long prompt next to it does not shorten an answer."""
    settings = replace(GREEDY, num_beams=2, max_new_tokens=60, min_new_tokens=60)
    short = Prompt([1, 5, 9])
    long = Prompt([1, *range(3, 300), *range(3, 200)])
    answers = engine_of(tiny, 4).generate([short, long], settings)
    assert len(answers[0]) == 60
    assert len(answers[1]) == 512 - len(long)


def test_generate_of_several_answers_has_a_seed_for_each(tiny):
    engine = engine_of(tiny)
    first = prompts(tiny)[:1]
    batch = engine.generate(first, replace(WILD, seed=4, num_return_sequences=3))
    assert batch[2] == engine.generate(first, replace(WILD, seed=6))[0]


def test_generate_returns_the_states_of_a_plain_pass(tiny_x):
    settings = replace(GREEDY, force_image=True, max_new_tokens=80)
    for n_beams in (1, 2):
        states = HiddenStates()
        answers = engine_of(tiny_x, 4).generate(
            prompts(tiny_x), replace(settings, num_beams=n_beams), states=states
        )
        for row, (prompt, ids) in enumerate(zip(prompts(tiny_x), answers, strict=True)):
            with torch.inference_mode():
                complete = embeddings(tiny_x.llm, prompt, ids)
                passed = tiny_x.llm.model(inputs_embeds=complete[None]).last_hidden_state[0]
            positions = range(1, len(ids) - 1)
            expected = passed[len(prompt) + 1 : -1]
            torch.testing.assert_close(states.at(row, positions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled image", "2 beams"])
def test_submit_from_threads_with_cancelled_requests(system, kind):
    """Answers equal those alone, also cancelled ones as far as they were read.

    All rows are free at the end.
    """
    settings = SETTINGS[kind]
    engine = engine_of(system, 4)
    expected = generate(system.llm, system.tokenizer, prompts(system), settings, seeds=SEEDS)
    answers: dict[int, list[int]] = {}

    def ask(variant: int) -> None:
        row = variant % 5
        request = engine.submit(prompts(system)[row], settings, seed=SEEDS[row])
        answers[variant] = list(request.initial_ids)
        for token in request:
            answers[variant].append(token)
            if variant % 3 == 2 and len(answers[variant]) == 4:
                break

    threads = [threading.Thread(target=ask, args=(variant,)) for variant in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for variant, ids in answers.items():
        complete = expected[variant % 5]
        assert ids == (complete[:4] if variant % 3 == 2 else complete), variant
    wait_until_idle(engine)


def test_generate_reuses_the_start_of_other_conversations(tiny):
    """Also of an unfinished answer.

    The cached start is copied, and the next turn reads only its new tokens.
    """
    engine = engine_of(tiny, 4)
    tokenizer = tiny.tokenizer
    system = tokenizer.encode_parts(
        ["Answer politely, with few words, and never about the weather."], add_bos=True
    )
    questions = ("What is this animal? A fish?", "no", "Why so?")
    inputs = [[*system, *tokenizer.encode_parts([text])] for text in questions]
    expected = generate(tiny.llm, tokenizer, [Prompt(ids) for ids in inputs], GREEDY)
    read: list[int] = []
    hook = tiny.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    first = iter(engine.submit(Prompt(inputs[0]), GREEDY))
    streamed = [next(first)]
    assert engine.generate([Prompt(inputs[1])], GREEDY) == [expected[1]]
    assert [*streamed, *first] == expected[0]
    assert engine.generate([Prompt(inputs[2])], GREEDY) == [expected[2]]
    longer = Prompt([*inputs[0], *expected[0][:-1], *tokenizer.encode_parts(["And this?"])])
    answer = engine.generate([longer], GREEDY)
    hook.remove()
    assert answer == generate(tiny.llm, tokenizer, [longer], GREEDY)

    first_read, *others = [length for length in read if length > 1]
    new_tokens = [len(ids) - len(system) for ids in inputs[1:]]
    new_tokens.append(len(longer) - len(inputs[0]) - len(expected[0]) + 1)
    assert first_read == len(inputs[0])
    assert all(length <= new for length, new in zip(others, new_tokens, strict=False)), (
        others,
        new_tokens,
    )


def test_prompts_with_other_images_share_no_more_than_their_text(tiny_x):
    """Equal ids with other features are other prompts: the cached prefix ends before the first
    image.
    """
    engine = engine_of(tiny_x, 4)
    width = tiny_x.llm.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(4):
        features = torch.randn(6, width, generator=generator) * 0.05
        ids = [1, 5, 6, 0, 0, 0, 0, 0, 0, 9, 10]
        inputs.append(Prompt(ids, [PromptImage(features, range(3, 9))]))
    keys = inputs[0].prefix_keys().tolist()
    assert keys[:3] == [1, 5, 6] and all(key < 0 for key in keys[3:9])
    two_images = Prompt([*ids, 0, 0], [*inputs[0].images, PromptImage(features[:2], range(11, 13))])
    assert (
        two_images.prefix_keys()[:11].tolist() == keys
    )  # an image behind it changes nothing before
    alone = [engine_of(tiny_x).generate([prompt], GREEDY)[0] for prompt in inputs]
    for _ in range(2):
        assert [engine.generate([prompt], GREEDY)[0] for prompt in inputs] == alone


def test_generate_of_long_and_short_prompts_with_common_starts(tiny):
    """One to three at once: rows are freed, copied and exchanged in many orders, and beams branch
    between them.
    """
    engine = engine_of(tiny, 6)
    rng = random.Random(0)
    starts = [[rng.randrange(3, 300) for _ in range(60)] for _ in range(3)]
    for count in (1, 1, 1, 1, 1, 1, 1, 2, 3, 1, 2, 3, 1, 1, 2):
        short = replace(GREEDY, max_new_tokens=4, num_beams=rng.choice((1, 1, 2)))
        inputs = []
        for _ in range(count):
            start = rng.choice(starts)[: rng.choice((0, 3, 30, 60))]
            inputs.append(
                Prompt([*start, *(rng.randrange(3, 300) for _ in range(rng.choice((2, 40))))])
            )
        assert engine.generate(inputs, short) == generate(tiny.llm, tiny.tokenizer, inputs, short)


@pytest.mark.slow
@pytest.mark.process
def test_generate_compiled_equals_eager(tiny):
    """For any number of rows and positions, with at most three graphs."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = engine_of(tiny, 8)
    compiled = engine_of(tiny, 8, compiled=True)
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 5), (3, 40), (8, 150), (5, 10), (2, 300), (1, 400), (4, 5)):
        batch = [
            Prompt(torch.randint(3, 300, (length + row,), generator=generator).tolist())
            for row in range(rows)
        ]
        assert compiled.generate(batch, GREEDY) == eager.generate(batch, GREEDY), (rows, length)
    assert compiled.generate(batch, replace(WILD, seed=3)) == eager.generate(
        batch, replace(WILD, seed=3)
    )
    assert counters["stats"]["unique_graphs"] <= 3


def test_submit_of_bad_requests_ends_only_these(tiny):
    engine = engine_of(tiny, 2)
    good = prompts(tiny)[1]
    expected = generate(tiny.llm, tiny.tokenizer, [good], GREEDY)[0]
    with pytest.raises(GenerationError, match="context ends at"):
        engine.submit(Prompt([1] * 10_000), GREEDY)
    parallel = engine.submit(good, GREEDY)
    broken = Prompt.of_embeddings(torch.full((3, tiny.llm.config.hidden_size), float("nan")))
    with pytest.raises(GenerationError, match="not numbers"):
        list(engine.submit(broken, GREEDY))
    with pytest.raises(IndexError):
        list(engine.submit(Prompt([10**6]), GREEDY))  # not in the vocabulary
    assert list(parallel) == expected
    for _ in range(3):  # in every row, those of the NaN included
        assert engine.generate([good, good], GREEDY) == [expected, expected]


def test_submit_with_too_few_tokens(tiny):
    engine = engine_of(tiny, 2)
    with pytest.raises(GenerationError, match="context ends at 512"):
        engine.submit(Prompt([5] * 600), GREEDY)
    with pytest.raises(GenerationError, match="An image needs 33 new tokens, but only 20"):
        engine.submit(Prompt([5] * 491), GenerationSettings(force_image=True, do_sample=False))
    with pytest.raises(GenerationError, match="needs 3 rows of the KV cache.*but it has 2"):
        engine.submit(Prompt([5]), replace(GREEDY, num_beams=3))


def test_image_constraints_start_images_only_where_one_fits(tiny):
    vocabulary = tiny.tokenizer.vocabulary
    scores = torch.zeros(1, vocabulary.size)
    no_ids = torch.zeros(1, 0, dtype=torch.long)
    for budget, allowed in ((vocabulary.image_length, True), (vocabulary.image_length - 1, False)):
        masked = ImageLogitsProcessor(ImageConstraints(vocabulary), budget=budget)(no_ids, scores)
        assert bool(torch.isfinite(masked[0, vocabulary.boi_id])) is allowed


@pytest.mark.parametrize("kind", ["sampled", "2 beams", "sampled beams"])
def test_generate_completes_every_image(tiny, kind):
    vocabulary = tiny.tokenizer.vocabulary
    forced = replace(SETTINGS[kind], max_new_tokens=80, force_image=True, seed=3)
    for ids in engine_of(tiny).generate(prompts(tiny)[1:3], forced):
        image_start = None
        for position, id in enumerate(ids):
            if id == vocabulary.boi_id:
                image_start = position
            elif id == vocabulary.eoi_id:
                assert image_start is not None
                assert position - image_start == vocabulary.tokens_per_image + 1
                image_start = None
            else:
                assert vocabulary.is_code_id(id) == (image_start is not None)
        assert image_start is None


def test_kv_cache_of_a_large_model_takes_memory_where_it_is_written():
    """Of SEED-LLaMA 8B: 4 GiB in 64 tables, none of which is large."""

    def resident_bytes() -> int:
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    cache = KVCache(plan_cache(2 * 32 * 4096 * 2, 2048, CPU_BYTES, 16))
    before = resident_bytes()
    cache.allocate(32, 32, 128, torch.bfloat16, torch.device("cpu"))
    assert resident_bytes() < before + 10**8
    assert cache.layers[31][1][2].count_nonzero() == 0
