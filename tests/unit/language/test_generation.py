"""Generation with a tiny random model: pictures are well-formed in every mode, and switching the rule off is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.language.answer import BrokenImagePart, ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, ImageSpanLogitsProcessor, generate_ids
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.tokenizer import MultimodalTokenizer

GREEDY = GenerationSettings(max_new_tokens=40, do_sample=False)


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> LlamaForCausalLM:
    return load_llm(llm_folder)


@pytest.fixture(scope="module")
def eager(llm_folder: Path, tokenizer: MultimodalTokenizer) -> LlamaForCausalLM:
    """The same model, very fond of image words and of the end token: it breaks pictures whenever it may."""
    fond = load_llm(llm_folder)
    words = tokenizer.vocabulary
    with torch.no_grad():
        fond.lm_head.weight[:words.n_text] *= 0.5
        fond.lm_head.weight[2] *= 3
        fond.lm_head.weight[words.n_text:] *= 2
    return fond


def prompts(tokenizer: MultimodalTokenizer) -> list[list[int]]:
    texts = ["USER: hello\nASSISTANT:", "USER: What is this animal? It is a cat, a cat, a cat.\nASSISTANT:", "a"]
    return [tokenizer.encode(text, add_bos=True) for text in texts]


ODD = {"temperature": 0.01, "top_p": 0.1, "top_k": 1, "do_sample": True, "num_beams": 3, "repetition_penalty": 5.0,
       "forced_eos_token_id": 7, "bad_words_ids": [[5], [6], [40]], "min_length": 60,
       "min_new_tokens": 30, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(20, 200)), "length_penalty": -9.0,
       "sequence_bias": [[[300], 50.0]], "exponential_decay_length_penalty": [1, 9.0], "begin_suppress_tokens": [3],
       "encoder_repetition_penalty": 3.0, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "min_p": 0.9,
       "max_length": 3, "max_time": 1e-9, "stop_strings": ["a"], "num_return_sequences": 3, "eos_token_id": 11,
       "guidance_scale": 4.0, "renormalize_logits": True, "return_dict_in_generate": True, "output_scores": True,
       "remove_invalid_values": True, "use_cache": False, "cache_implementation": "static", "unknown_thing": 1}


WRONG = {"forced_bos_token_id": 5, "suppress_tokens": [5], "temperature": "hot", "num_beams": 0}


@pytest.mark.parametrize("odd_values", [ODD, WRONG])
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_the_checkpoints_own_generation_settings_do_not_leak(
    where: str, odd_values: dict, model: LlamaForCausalLM, llm_folder: Path, tokenizer: MultimodalTokenizer,
    tmp_path: Path,
) -> None:
    shutil.copytree(llm_folder, tmp_path / "odd")
    file = tmp_path / "odd" / where
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd_values}))
    odd = load_llm(tmp_path / "odd")
    for settings in (GREEDY, GenerationSettings(max_new_tokens=40, seed=3, top_p=1.0, temperature=2.0),
                     GenerationSettings(max_new_tokens=20, num_beams=2, do_sample=False)):
        expected = generate_ids(model, prompts(tokenizer), settings, tokenizer)
        assert generate_ids(odd, prompts(tokenizer), settings, tokenizer) == expected


def assert_well_formed(ids: list[int], tokenizer: MultimodalTokenizer) -> int:
    parts = split_answer(ids, tokenizer)
    assert not [part for part in parts if isinstance(part, BrokenImagePart)], tokenizer.decode(ids)
    return sum(isinstance(part, ImagePart) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_pictures_are_whole(
    eager: LlamaForCausalLM, tokenizer: MultimodalTokenizer, beams: int, sample: bool, force: bool
) -> None:
    found = 0
    for seed in range(3):
        settings = GenerationSettings(max_new_tokens=45, num_beams=beams, do_sample=sample, top_p=1.0, top_k=0,
                                      seed=seed, force_image=force)
        answers = generate_ids(eager, prompts(tokenizer), settings, tokenizer)
        assert len(answers) == 3
        for ids in answers:
            pictures = assert_well_formed(ids, tokenizer)
            assert not force or (ids[0] == tokenizer.vocabulary.boi_id and pictures >= 1)
            found += pictures
    assert found > 0


def test_without_the_rule_this_model_breaks_pictures(eager: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=45, top_p=1.0, top_k=0, seed=0, constrain=False)
    parts = [part for ids in generate_ids(eager, prompts(tokenizer), settings, tokenizer)
             for part in split_answer(ids, tokenizer)]
    assert any(isinstance(part, BrokenImagePart) for part in parts)


@pytest.mark.parametrize("budget", range(1, 16))
def test_a_picture_is_only_begun_when_it_can_be_finished(
    eager: LlamaForCausalLM, tokenizer: MultimodalTokenizer, budget: int
) -> None:
    for seed in range(4):
        settings = GenerationSettings(max_new_tokens=budget, top_p=1.0, top_k=0, seed=seed)
        for ids in generate_ids(eager, prompts(tokenizer), settings, tokenizer):
            assert len(ids) <= budget
            assert assert_well_formed(ids, tokenizer) <= budget // tokenizer.vocabulary.image_length


def test_a_forced_picture_needs_room(eager: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    enough = tokenizer.vocabulary.tokens_per_image + 1
    with pytest.raises(GenerationError, match=f"needs {enough} new tokens, but only {enough - 1}"):
        short = GenerationSettings(max_new_tokens=enough - 1, force_image=True)
        generate_ids(eager, prompts(tokenizer), short, tokenizer)
    settings = GenerationSettings(max_new_tokens=enough, force_image=True)
    answers = generate_ids(eager, prompts(tokenizer), settings, tokenizer)
    assert [assert_well_formed(ids, tokenizer) for ids in answers] == [1, 1, 1]


def test_a_picture_begun_in_the_prompt_is_finished(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    words = tokenizer.vocabulary
    start = [1, words.boi_id, words.n_text, words.n_text + 1]
    ids = start[1:] + generate_ids(model, [start], GREEDY, tokenizer)[0]
    assert_well_formed(ids, tokenizer)
    assert all(words.is_code_id(id) for id in ids[1:6]) and ids[6] == words.eoi_id


@pytest.mark.parametrize("kind", ["greedy", "beams", "sampled"])
def test_switched_off_it_is_plain_generate(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer, kind: str) -> None:
    prompt = prompts(tokenizer)[1]
    settings = {"greedy": GenerationSettings(do_sample=False, max_new_tokens=30, constrain=False),
                "beams": GenerationSettings(do_sample=False, num_beams=4, max_new_tokens=30, constrain=False),
                "sampled": GenerationSettings(max_new_tokens=30, seed=5, constrain=False)}[kind]
    config = GenerationConfig(
        max_new_tokens=30, num_beams=settings.num_beams, do_sample=settings.do_sample, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **({"temperature": 1.0, "top_p": 0.5, "top_k": 50} if settings.do_sample else {}))
    torch.manual_seed(5)
    inputs = torch.tensor([prompt])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    plain = output[0, len(prompt):].tolist()
    mine = generate_ids(model, [prompt], settings, tokenizer)[0]
    assert mine == (plain[:plain.index(2) + 1] if 2 in plain else plain)


def test_the_rule_changes_nothing_that_was_well_formed(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    """A model that never says image words says the same with the rule on."""
    quiet = model
    saved = quiet.lm_head.weight.detach().clone()
    with torch.no_grad():
        quiet.lm_head.weight[tokenizer.vocabulary.n_text:] = 0
        quiet.lm_head.weight[tokenizer.vocabulary.n_text:, :] -= 1e-3
    free = GenerationSettings(max_new_tokens=20, do_sample=False, constrain=False)
    answers = [generate_ids(quiet, prompts(tokenizer), settings, tokenizer)
               for settings in (free, GenerationSettings(max_new_tokens=20, do_sample=False))]
    with torch.no_grad():
        quiet.lm_head.weight.copy_(saved)
    assert all(id < tokenizer.vocabulary.n_text for ids in answers[0] for id in ids)
    assert answers[0] == answers[1]


def test_a_batch_says_what_single_prompts_say(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    together = generate_ids(model, prompts(tokenizer), GREEDY, tokenizer)
    alone = [generate_ids(model, [prompt], GREEDY, tokenizer)[0] for prompt in prompts(tokenizer)]
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 3


def test_seeds(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=20, top_p=1.0, top_k=0, seed=seed)
        return generate_ids(model, prompts(tokenizer), settings, tokenizer)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = draw(3), draw(3), draw(4)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_draws_what_single_prompts_draw(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer,
                                                beams: int) -> None:
    settings = GenerationSettings(max_new_tokens=20, top_p=1.0, top_k=0, seed=7, num_beams=beams)
    alone = [generate_ids(model, [prompt], settings, tokenizer)[0] for prompt in prompts(tokenizer)]
    assert generate_ids(model, prompts(tokenizer), settings, tokenizer) == alone
    unseeded = GenerationSettings(max_new_tokens=20, top_p=1.0, top_k=0, num_beams=beams)
    torch.manual_seed(3)
    alone = [generate_ids(model, [prompt], unseeded, tokenizer)[0] for prompt in prompts(tokenizer)]
    torch.manual_seed(3)
    assert generate_ids(model, prompts(tokenizer), unseeded, tokenizer) == alone


@pytest.mark.parametrize("beams", [1, 3])
def test_global_random_state_is_neither_read_nor_set(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer,
                                                     beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the CPU's nor that of any GPU; other people's draws during the generation change nothing."""
    settings = GenerationSettings(max_new_tokens=20, top_p=1.0, top_k=0, seed=7, num_beams=beams)
    want = generate_ids(model, prompts(tokenizer), settings, tokenizer)
    forward, states = model.model.forward, []

    def disturbed(*args, **kwargs):
        states.append(torch.get_rng_state())
        return forward(*args, **kwargs)

    def refused(*args, **kwargs):
        raise AssertionError("the global random state was touched")

    state = torch.get_rng_state()
    monkeypatch.setattr(model.model, "forward", disturbed)
    for place, name in ((torch, "manual_seed"), (torch.random, "fork_rng"), (torch, "set_rng_state"),
                        (torch.cuda, "manual_seed_all"), (torch.cuda, "set_rng_state"), (torch.cuda, "get_rng_state")):
        monkeypatch.setattr(place, name, refused)
    assert generate_ids(model, prompts(tokenizer), settings, tokenizer) == want
    assert len(states) > 10 and all(torch.equal(one, state) for one in [*states, torch.get_rng_state()])
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: (torch.rand(5), forward(*args, **kwargs))[1])
    assert generate_ids(model, prompts(tokenizer), settings, tokenizer) == want


def test_temperature_zero_is_greedy(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    cold = GenerationSettings(max_new_tokens=15, temperature=0.0)
    assert generate_ids(model, prompts(tokenizer), cold, tokenizer) == generate_ids(
        model, prompts(tokenizer), GenerationSettings(max_new_tokens=15, do_sample=False), tokenizer)


def test_the_context_is_respected(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    context = model.config.max_position_embeddings
    ids = generate_ids(model, [[1] + [300] * (context - 4)], GREEDY, tokenizer)[0]
    assert len(ids) <= 3
    with pytest.raises(GenerationError, match=f"context ends at {context}"):
        generate_ids(model, [[1] + [300] * (context - 1)], GREEDY, tokenizer)


def test_bad_prompts_and_settings(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    assert generate_ids(model, [], GREEDY, tokenizer) == []
    for prompt in ([], [1, len(tokenizer)], [-1]):
        with pytest.raises(GenerationError):
            generate_ids(model, [prompt], GREEDY, tokenizer)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": -0.1}, {"top_p": 1.5}, {"num_beams": 0},
                  {"top_k": -1}, {"seed": 2**64}, {"seed": -2**63 - 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GenerationSettings(**wrong)
    assert GenerationSettings(seed=2**64 - 1).seed == 2**64 - 1  # half of what torch.seed() returns is above 2**63


def test_streamer_sees_every_new_id(model: LlamaForCausalLM, tokenizer: MultimodalTokenizer) -> None:
    class Collector:
        ids: list[int] = []
        ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids = [*self.ids, *value.flatten().tolist()]

        def end(self) -> None:
            self.ended = True

    collector, prompt = Collector(), prompts(tokenizer)[0]
    answer = generate_ids(model, [prompt], GREEDY, tokenizer, streamer=collector)[0]
    assert collector.ended and collector.ids == prompt + answer


def test_processor_table(tokenizer: MultimodalTokenizer) -> None:
    """Which kinds of words may come next, state by state."""
    words = tokenizer.vocabulary
    boi, eoi, code = words.boi_id, words.eoi_id, words.n_text
    full = [boi, *[code] * 5]
    rows = {"text": [1, 300], "open": [300, boi], "four": [boi, *[code] * 4], "five": full, "closed": [*full, eoi]}
    length = max(map(len, rows.values()))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows.values()])
    rule = ImageSpanLogitsProcessor(words, max_length=length + words.image_length)
    allowed = torch.isfinite(rule(ids, torch.zeros(5, words.size + 3)))
    kinds = {"text": allowed[:, :words.n_text], "code": allowed[:, code:boi], "open": allowed[:, boi:eoi],
             "close": allowed[:, eoi:words.size]}
    table = {name: {kind for kind, block in kinds.items() if block[number].all()} for number, name in enumerate(rows)}
    assert table == {"text": {"text", "open"}, "open": {"code"}, "four": {"code"}, "five": {"close"},
                     "closed": {"text", "open"}}
    assert not allowed[:, words.size:].any()
    tight = ImageSpanLogitsProcessor(words, max_length=rule.max_length - 1)(ids, torch.zeros(5, words.size))
    assert not torch.isfinite(tight[:, boi]).any()
