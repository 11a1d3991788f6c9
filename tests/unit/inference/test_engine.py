"""Contract of `Engine`: whatever else runs, an answer equals that of transformers' `generate`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from reference_generation import embeddings, generate
from tensors import normal
from tiny.language import ARCHITECTURES, random_llm
from waiting import wait_until
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, PromptImage
from seed_multimodal.settings import read_settings

SETTINGS = {
    name: read_settings(GenerationSettings, fields, name)
    for name, fields in read_tables(__file__).items()
}
GREEDY = SETTINGS["greedy"]
SAMPLED = SETTINGS["sampled"]
# Where families differ: their image tokens and prompts.
OF_EACH_FAMILY = ("greedy", "sampled image", "guided image", "beams of an image")
PAIRS = [("tiny", name) for name in SETTINGS]
PAIRS += [(family, name) for family in ("tiny_x", "tiny_lavit") for name in OF_EACH_FAMILY]
# Asked in all ways in the suite, where rows are held differently; at night all are.
IN_ALL_WAYS = (
    *(("tiny", name) for name in ("a stop", "guided image", "beams of an image")),
    ("tiny_x", "sampled image"),
    ("tiny_lavit", "sampled image"),
)
CASES = [
    *((family, name, (family, name) in IN_ALL_WAYS) for family, name in PAIRS),
    *(
        pytest.param(family, name, True, marks=pytest.mark.nightly)
        for family, name in PAIRS
        if (family, name) not in IN_ALL_WAYS
    ),
]
TEXTS = (
    "a",
    "What is this animal?",
    "Please draw a fish.",
    "no",
    "Where is the cat that was here?",
)
SEEDS = [5, 4, 3, 2, 1]


def seeded(settings):
    return [replace(settings, seed=seed) for seed in SEEDS]


def engine_of(system, max_rows: int = 16, **options) -> Engine:
    return Engine(TorchBackend(system.llm, max_rows=max_rows, **options), system.tokenizer)


def prompts(system) -> list[Prompt]:
    """Every second one as embeddings, the others as ids; unconditional prompts of any length."""
    tokenizer = system.tokenizer
    boi = tokenizer.vocabulary.boi_id
    embed = system.llm.get_input_embeddings()
    mixed = []
    for row, text in enumerate(TEXTS):
        ids = tokenizer.encode_parts([text], add_bos=True)
        prompt = Prompt(ids) if row % 2 else Prompt.of_embeddings(embed(torch.tensor(ids)))
        negative = None if row == 0 else [*ids[: 3 * row], boi]
        mixed.append(replace(prompt, negative=negative))
    return mixed


@pytest.mark.slow
@pytest.mark.parametrize("family, name, in_all_ways", CASES)
def test_answers_equal_those_of_transformers(request, family, name, in_all_ways):
    system = request.getfixturevalue(family)
    settings = SETTINGS[name]
    asked = prompts(system)
    expected = generate(system.llm, system.tokenizer, asked, settings, seeds=SEEDS)
    if name == "a stop":
        assert any(len(ids) < 30 for ids in expected)

    # 1. Together, and where most requests wait for rows.
    assert engine_of(system).generate(asked, seeded(settings)) == expected
    if not in_all_ways:
        return
    engine = engine_of(system, max_rows=6)
    assert engine.generate(asked, seeded(settings)) == expected

    # 2. Streamed to callers in threads, a third of which leave after four tokens.
    firsts = expected[:: settings.num_return_sequences]

    def read(caller):
        row = caller % 5
        stream = engine.submit(asked[row], replace(settings, seed=SEEDS[row]))
        ids = list(stream.initial_ids)
        for token in stream:
            ids.append(token)
            if caller % 3 == 2 and len(ids) == 4:
                break
        return ids, stream.finish_reason

    with ThreadPoolExecutor(15) as pool:
        answers = list(pool.map(read, range(15)))
    for caller, (ids, reason) in enumerate(answers):
        complete = firsts[caller % 5]
        if caller % 3 == 2:
            assert ids == complete[:4]
            continue
        is_cut = name == "a stop" and len(ids) < settings.max_new_tokens
        ends = is_cut or ids[-1] in system.tokenizer.eos_token_ids
        assert (ids, reason) == (complete, "stop" if ends else "length")

    # 3. No row is lost, and alone each answer is the same, with rows that hold its prompt.
    wait_until(lambda: (engine.n_decoding, engine.reading, engine.n_waiting) == (0, [], 0))
    alone = [
        engine.generate([prompt], replace(settings, seed=seed))
        for prompt, seed in zip(asked, SEEDS, strict=True)
    ]
    assert [ids for answer in alone for ids in answer] == expected


def test_answers_beside_those_of_other_settings(tiny):
    asked = prompts(tiny)[1]
    names = ("greedy", "no constraints", "sampled", "top k", "repetition penalty")
    engine = engine_of(tiny)
    streams = [engine.submit(asked, replace(SETTINGS[name], seed=5)) for name in names]
    together = [[*stream.initial_ids, *stream] for stream in streams]
    alone = [
        engine_of(tiny).generate([asked], replace(SETTINGS[name], seed=5))[0] for name in names
    ]
    assert together == alone


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name.startswith("gemma2") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_answers_of_other_architectures(tiny, architecture):
    # Windows, soft caps and layers without rotation reach masks and positions of our own.
    tokenizer = tiny.tokenizer
    # With larger weights Gemma's soft caps give many tokens equal scores.
    llm = random_llm(architecture, len(tokenizer), initializer_range=0.2)
    asked = [Prompt(tokenizer.encode_parts([text], add_bos=True)) for text in TEXTS[2:]]
    engine = Engine(TorchBackend(llm), tokenizer)
    beams = replace(SETTINGS["beams of an image"], max_new_tokens=40)
    for settings in (GREEDY, beams):
        expected = generate(llm, tokenizer, asked, settings)
        assert engine.generate(asked, settings) == expected


def test_backend_of_an_unknown_architecture(tiny):
    # Its scores, which it scales, would be wrong.
    llm = random_llm("granite", len(tiny.tokenizer), logits_scaling=8.0)
    with pytest.raises(ConfigError, match="granite"):
        TorchBackend(llm, max_rows=1)


@pytest.mark.nightly
@pytest.mark.process
def test_answers_of_a_compiled_model(tiny):
    """For any number of rows and positions, with at most three graphs."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = engine_of(tiny, 8)
    compiled = engine_of(tiny, 8, compiled=True)
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 5), (3, 40), (8, 150), (2, 300), (1, 400)):
        batch = [
            Prompt(torch.randint(3, 300, (length + row,), generator=generator).tolist())
            for row in range(rows)
        ]
        for settings in (GREEDY, replace(SAMPLED, seed=3)):
            assert compiled.generate(batch, settings) == eager.generate(batch, settings)
    assert counters["stats"]["unique_graphs"] <= 3


def test_answers_of_beams_end_at_their_own_context(tiny):
    # A long prompt beside it must not shorten a short one's answer.
    settings = replace(GREEDY, num_beams=2, max_new_tokens=60, min_new_tokens=60)
    long = Prompt([1, *range(3, 300), *range(3, 200)])
    answers = engine_of(tiny, 4).generate([Prompt([1, 5, 9]), long], settings)
    assert [len(ids) for ids in answers] == [60, 512 - len(long)]


@pytest.mark.parametrize(
    "settings",
    [
        {"images": "forced", "max_new_tokens": 80},
        # Beams that end early: their later states belong to no answer.
        {
            "constrain": False,
            "num_beams": 4,
            "length_penalty": -3.0,
            "stop_token_ids": tuple(range(3, 60)),
        },
    ],
)
def test_hidden_states_are_those_of_a_plain_pass(tiny_x, settings):
    # SEED-X draws from them: another beam's states are another image.
    asked = prompts(tiny_x)
    engine = engine_of(tiny_x, 4)
    requests = engine.run(asked, replace(GREEDY, **settings))
    for prompt, request in zip(asked, requests, strict=True):
        ids = request.answers[0]
        positions = range(len(ids) - 1)
        with pytest.raises(GenerationError):  # nothing follows the last token
            request.states_at([len(ids) - 1])
        if not positions:
            continue
        with torch.inference_mode():
            complete = embeddings(tiny_x.llm, prompt, ids)
            passed = tiny_x.llm.model(inputs_embeds=complete[None]).last_hidden_state[0]
        expected = passed[len(prompt) : -1]
        torch.testing.assert_close(request.states_at(positions), expected, rtol=1e-4, atol=1e-5)


def test_prompts_of_other_images_share_no_more_than_their_text(tiny_x):
    # Equal ids with other features are other prompts.
    engine = engine_of(tiny_x, 4)
    width = tiny_x.llm.config.hidden_size
    inputs = []
    for seed in range(4):
        features = normal(seed, 6, width) * 0.05
        ids = [1, 5, 6, 0, 0, 0, 0, 0, 0, 9, 10]
        inputs.append(Prompt(ids, [PromptImage(features, range(3, 9))]))
    alone = [engine_of(tiny_x).generate([prompt], GREEDY)[0] for prompt in inputs]
    assert len(set(map(tuple, alone))) > 1
    for _ in range(2):
        assert [engine.generate([prompt], GREEDY)[0] for prompt in inputs] == alone
