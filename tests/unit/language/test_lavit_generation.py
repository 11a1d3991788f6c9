"""LaVIT's generation against plain loops written here (whole sequences, no cache, no batch, no padding)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError, RequestError
from seed_multimodal.language.lavit import LavitTokenizer, LavitWords, understand_inputs
from seed_multimodal.language.lavit_generation import (
    ANSWERS,
    CAPTIONS,
    CodeSettings,
    WrittenPicture,
    continued,
    generate_codes,
    generate_text,
)

PADDING_ROWS = 10
GREEDY = CodeSettings(do_sample=False, max_new_tokens=12, min_new_tokens=3, guidance=3.0)
DRAWN = CodeSettings(max_new_tokens=12, min_new_tokens=3, guidance=2.0, top_k=8, top_p=0.9, temperature=1.5, seed=5)


@pytest.fixture(scope="module")
def words(lavit_tokenizer: LavitTokenizer) -> LavitWords:
    return lavit_tokenizer.vocabulary


@pytest.fixture(scope="module")
def llm(words: LavitWords) -> LlamaForCausalLM:
    """A random LLaMA with more rows than words, all of them likely."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=words.size + PADDING_ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=96))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
        model.lm_head.weight[words.size:] *= 4
    return model.eval()


@pytest.fixture(scope="module")
def prompts(lavit_tokenizer: LavitTokenizer) -> list[list[int]]:
    """Of different lengths; with a picture, and empty."""
    parts = [["a red apple"], [[3, 7, 1], "It is a cat. It is a dog."], [""], [[5], [2, 2]]]
    return [lavit_tokenizer.drawing_ids(part) for part in parts]


def scores_behind(llm: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.tensor([ids])).logits[0, -1]


def code_scores(llm: LlamaForCausalLM, words: LavitWords, prompt: list[int], negative: list[int], done: list[int],
                settings: CodeSettings) -> Tensor:
    """Scores of the next image word after `done`."""
    wanted = scores_behind(llm, [*prompt, words.boi_id, *done]).log_softmax(0)
    if settings.guidance != 1:
        other = scores_behind(llm, [*negative, *done]).log_softmax(0)
        wanted = other + settings.guidance * (wanted - other)
    wanted[3:words.n_text] = wanted[words.size:] = -torch.inf
    if len(done) < settings.min_new_tokens:
        wanted[words.eoi_id] = -torch.inf
    return wanted


def loop(llm: LlamaForCausalLM, words: LavitWords, prompt: list[int], settings: CodeSettings,
         choose: Callable[[Tensor], int], negative: list[int] | None = None) -> list[int]:
    done: list[int] = []
    while len(done) < settings.max_new_tokens and words.eoi_id not in done:
        done.append(choose(code_scores(llm, words, prompt, negative or [words.boi_id], done, settings)))
    return done


def drawer(settings: CodeSettings, seed: int) -> Callable[[Tensor], int]:
    """Temperature, top-k and top-p in plain words."""
    generator = torch.Generator().manual_seed(seed)

    def choose(scores: Tensor) -> int:
        scores = scores / settings.temperature
        scores = scores.where(scores >= scores.topk(settings.top_k).values[-1], -torch.inf)
        likely, order = scores.softmax(0).sort(descending=True)
        scores[order[likely.cumsum(0) - likely >= settings.top_p]] = -torch.inf
        return int(torch.multinomial(scores.softmax(0), 1, generator=generator))

    return choose


def ids_of(pictures: list[WrittenPicture]) -> list[list[int]]:
    return [picture.ids for picture in pictures]


# ---- guidance against plain loops


@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.0])
def test_the_likeliest_words(guidance: float, llm, words, prompts) -> None:
    settings = replace(GREEDY, guidance=guidance)
    expected = [loop(llm, words, prompt, settings, lambda scores: int(scores.argmax())) for prompt in prompts]
    assert ids_of(generate_codes(llm, words, prompts, settings)) == expected
    for prompt, alone in zip(prompts, expected, strict=True):
        assert ids_of(generate_codes(llm, words, [prompt], settings)) == [alone]


def test_guidance_changes_what_is_written(llm, words, prompts) -> None:
    written = [ids_of(generate_codes(llm, words, prompts, replace(GREEDY, guidance=g))) for g in (1.0, 3.0)]
    assert written[0] != written[1]


def test_several_drawn_pictures_a_prompt(llm, words, prompts) -> None:
    settings, seeds = replace(DRAWN, number=3), [11, 2**64 - 1, 13, 14]
    written = ids_of(generate_codes(llm, words, prompts, settings, seeds=seeds))
    expected = [loop(llm, words, prompt, settings, drawer(settings, (seed + place) % 2**64))
                for prompt, seed in zip(prompts, seeds, strict=True) for place in range(3)]
    assert written == expected and len({tuple(ids) for ids in written}) > 6


def test_a_picture_does_not_depend_on_the_others(llm, words, prompts) -> None:
    settings = replace(DRAWN, number=2)
    together = ids_of(generate_codes(llm, words, prompts, settings))
    for place, prompt in enumerate(prompts):
        assert ids_of(generate_codes(llm, words, [prompt], settings)) == together[2 * place:2 * place + 2]
        assert ids_of(generate_codes(llm, words, [prompt], DRAWN)) == [together[2 * place]]


@pytest.mark.parametrize("number", [1, 2])
def test_negative_words_for_each_prompt(number: int, llm, words, prompts) -> None:
    settings = replace(DRAWN, number=number)
    negative = [[9, words.boi_id], [7, 8, 30, words.boi_id], [words.boi_id], [1, words.boi_id]]
    expected = [loop(llm, words, prompt, settings, drawer(settings, 5 + place), against)
                for prompt, against in zip(prompts, negative, strict=True) for place in range(number)]
    assert ids_of(generate_codes(llm, words, prompts, settings, negative=negative)) == expected
    one = ids_of(generate_codes(llm, words, prompts, settings, negative=negative[1:2]))
    assert one[number:2 * number] == expected[number:2 * number]
    with pytest.raises(RequestError, match="4 prompts, but 2 negative ones"):
        generate_codes(llm, words, prompts, settings, negative=negative[:2])


# ---- beams


def beams_loop(llm: LlamaForCausalLM, words: LavitWords, prompt: list[int], settings: CodeSettings) -> list[list[int]]:
    """Beam search on guided scores: sums of scores, divided by length ** length_penalty once a beam has ended."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    count = settings.num_beams
    for length in range(1, settings.max_new_tokens + 1):
        found = []
        for score, done in running:
            scores = code_scores(llm, words, prompt, [words.boi_id], done, settings)
            best = scores.topk(2 * count)
            found += [(score + float(value), [*done, int(id)]) for value, id in zip(*best, strict=True)]
        found = sorted(found, reverse=True, key=lambda beam: beam[0])[:2 * count]
        last = length == settings.max_new_tokens
        ended += [(score / length**settings.length_penalty, ids) for score, ids in found[:count]
                  if last or ids[-1] == words.eoi_id]
        ended = sorted(ended, reverse=True, key=lambda beam: beam[0])[:count]
        running = [beam for beam in found if beam[1][-1] != words.eoi_id][:count]
        if len(ended) == count and (settings.early_stopping or
                                    running[0][0] / length**settings.length_penalty <= ended[-1][0]):
            break
    return [ids for _, ids in ended[:settings.number]]


@pytest.mark.parametrize(("guidance", "penalty", "early"), [(3.0, 1.0, False), (1.5, 0.0, True), (1.0, 1.0, False)])
def test_beams_follow_their_own_guidance(guidance: float, penalty: float, early: bool, llm, words, prompts) -> None:
    settings = CodeSettings(do_sample=False, num_beams=4, number=2, guidance=guidance, length_penalty=penalty,
                            early_stopping=early, max_new_tokens=9, min_new_tokens=2)
    expected = [ids for prompt in prompts for ids in beams_loop(llm, words, prompt, settings)]
    written = generate_codes(llm, words, prompts, settings)
    assert ids_of(written) == expected
    greedy = ids_of(generate_codes(llm, words, prompts, replace(settings, num_beams=1, number=1)))
    assert expected[::2] != greedy, "the case is too easy"


def test_beams_that_end_themselves(words, llm, prompts) -> None:
    """The end is likely, so that beams end at different lengths."""
    fond = LlamaForCausalLM(llm.config).eval()
    fond.load_state_dict(llm.state_dict())
    with torch.no_grad():
        fond.lm_head.weight[words.eoi_id] *= 2.5
    settings = CodeSettings(do_sample=False, num_beams=3, number=3, guidance=1.5, max_new_tokens=12, min_new_tokens=2)
    written = generate_codes(fond, words, prompts, settings)
    assert ids_of(written) == [ids for prompt in prompts for ids in beams_loop(fond, words, prompt, settings)]
    assert sum(picture.ended for picture in written) > 3 and len({len(picture.ids) for picture in written}) > 2


def test_drawn_beams_are_seeded_and_do_not_depend_on_the_others(llm, words, prompts) -> None:
    settings = replace(DRAWN, num_beams=3, number=2)
    together = ids_of(generate_codes(llm, words, prompts, settings))
    assert together == ids_of(generate_codes(llm, words, prompts, settings))
    assert together != ids_of(generate_codes(llm, words, prompts, replace(settings, seed=6)))
    assert ids_of(generate_codes(llm, words, prompts[1:2], settings)) == together[2:4]


def test_rows_that_continue_none_are_refused() -> None:
    before = torch.tensor([[4, 5], [4, 6], [7, 7], [7, 8]])
    now = torch.tensor([[4, 6, 1], [4, 6, 2], [7, 7, 1], [7, 8, 1]])
    assert continued(before, now, 2).tolist() == [1, 1, 2, 3]
    with pytest.raises(GenerationError, match="do not continue each other"):
        continued(before, now, 1)


# ---- what is written


def test_only_image_words_are_written_and_the_rest_left_out(llm, words, prompts) -> None:
    pictures = generate_codes(llm, words, prompts, CodeSettings(number=8, temperature=3.0, top_k=0, seed=0,
                                                                max_new_tokens=40))
    seen = {id for picture in pictures for id in picture.ids}
    assert seen <= {0, 1, 2, *range(words.boi_id, words.size)} and {0, 1, 2, words.boi_id} & seen
    for picture in pictures:
        assert len(picture.ids) > 20 or not picture.ended
        assert picture.codes.tolist() == [id - words.code_start for id in picture.ids if id >= words.code_start]


def test_a_picture_without_an_end_says_so(llm, words, prompts) -> None:
    cut, = generate_codes(llm, words, prompts[:1], replace(GREEDY, max_new_tokens=6, min_new_tokens=6))
    assert not cut.ended and len(cut.ids) == 6
    assert cut.note == (f"The model did not end the picture within 6 words; it is drawn from the {len(cut.codes)} "
                        f"codes that there are.")
    assert WrittenPicture(torch.tensor([1]), [words.code_start + 1, words.eoi_id], True).note == ""
    assert "wrote no image code in 1 words" in WrittenPicture(torch.tensor([]), [words.eoi_id], True).note


def test_prompts_with_pictures_do_not_cut_the_answer(llm, words, prompts) -> None:
    long = replace(GREEDY, max_new_tokens=30, min_new_tokens=30)
    assert {len(ids) for ids in ids_of(generate_codes(llm, words, prompts, long))} == {30}
    legacy = ids_of(generate_codes(llm, words, prompts, replace(long, legacy_max_length=True)))
    assert {len(ids) for ids in legacy} == {max(map(len, prompts))}
    assert len(generate_codes(llm, words, [[]], replace(long, legacy_max_length=True))[0].ids) == 1


def test_the_answer_ends_where_the_context_does(llm, words) -> None:
    settings = replace(GREEDY, max_new_tokens=200, min_new_tokens=200)
    assert len(generate_codes(llm, words, [[5] * 89], settings)[0].ids) == 96 - 90
    assert len(generate_codes(llm, words, [[5]], settings, negative=[[5] * 90])[0].ids) == 96 - 90
    with pytest.raises(GenerationError, match="prompt has 96 tokens, but the model's context ends at 96"):
        generate_codes(llm, words, [[5] * 95], settings)


def test_wrong_prompts_are_one_sentence(llm, words) -> None:
    assert generate_codes(llm, words, []) == []
    with pytest.raises(GenerationError, match=f"outside the vocabulary of {words.size} words"):
        generate_codes(llm, words, [[words.size]])
    with pytest.raises(GenerationError, match="Prompt 0 is empty"):
        generate_codes(llm, words, [[5]], negative=[[]])
    with pytest.raises(RequestError, match="1 prompts, but 2 seeds"):
        generate_codes(llm, words, [[5]], seeds=[1, 2])


@pytest.mark.parametrize("wrong", [
    {"num_beams": 2, "number": 3}, {"do_sample": False, "number": 2}, {"top_p": 0.0, "number": 2}, {"guidance": -1.0},
    {"max_new_tokens": 0}, {"temperature": "hot"}, {"number": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=r"\.$"):
        CodeSettings(**wrong)


# ---- texts


@pytest.fixture(scope="module")
def features(llm) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, llm.config.hidden_size, generator=generator) for count in (5, 1, 8)]


@pytest.mark.parametrize(("side", "settings"), [
    ("caption", CAPTIONS), ("answer", ANSWERS), ("caption", replace(CAPTIONS, number=2, repetition_penalty=1.3)),
    ("answer", replace(ANSWERS, num_beams=1))])
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
def test_texts_are_those_of_a_plain_generate(side, settings, llm, lavit_tokenizer, features) -> None:
    """transformers' own suppression, least length and penalties, a picture at a time."""
    texts = ["Is it?", "Question: It is a dog. Answer:", "a"]
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens, num_beams=settings.num_beams,
        length_penalty=settings.length_penalty, early_stopping=settings.early_stopping, do_sample=False,
        repetition_penalty=settings.repetition_penalty, num_return_sequences=settings.number,
        suppress_tokens=list(range(330, llm.config.vocab_size)), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    expected = []
    for feature, text in zip(features, texts, strict=True):
        embeds, mask = understand_inputs(llm, lavit_tokenizer, [feature], text, side)
        output = llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
        expected += [lavit_tokenizer.decode(row) for row in output.tolist()]
    together = understand_inputs(llm, lavit_tokenizer, features, texts, side)
    assert generate_text(llm, lavit_tokenizer, *together, settings) == expected
    assert len(set(expected)) > 2 and all(expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_drawn_texts_do_not_depend_on_the_others(beams: int, llm, lavit_tokenizer, features) -> None:
    settings = replace(CAPTIONS, do_sample=True, number=2, num_beams=beams, max_new_tokens=9, top_p=0.9)
    seeds, before = [4, 5, 6], torch.get_rng_state()
    together = generate_text(llm, lavit_tokenizer, *understand_inputs(llm, lavit_tokenizer, features), settings,
                             seeds=seeds)
    for place, feature in enumerate(features):
        alone = understand_inputs(llm, lavit_tokenizer, [feature])
        assert generate_text(llm, lavit_tokenizer, *alone, settings, seeds=seeds[place:place + 1]) == (
            together[2 * place:2 * place + 2])
    assert torch.equal(torch.get_rng_state(), before) and len(set(together)) > 3


def test_top_k_and_top_p_hold_for_texts(llm, lavit_tokenizer, features) -> None:
    inputs = understand_inputs(llm, lavit_tokenizer, features, "It is")
    plain = replace(CAPTIONS, num_beams=1)
    greedy = generate_text(llm, lavit_tokenizer, *inputs, plain)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}):
        assert generate_text(llm, lavit_tokenizer, *inputs, replace(plain, do_sample=True, **narrow)) == greedy
    assert generate_text(llm, lavit_tokenizer, *inputs, replace(plain, do_sample=True, seed=1)) != greedy


def test_no_image_word_in_a_text(llm, lavit_tokenizer, features) -> None:
    written: list[int] = []

    class Listener:
        def put(self, ids: Tensor) -> None:
            written.extend(ids.flatten().tolist())

        def end(self) -> None:
            pass

    settings = replace(CAPTIONS, num_beams=1, do_sample=True, temperature=5.0, top_k=0, seed=2)
    generate_text(llm, lavit_tokenizer, *understand_inputs(llm, lavit_tokenizer, features[:1]), settings,
                  streamer=Listener())
    assert 8 < len(written) <= 36 and max(written) < 330


def test_a_watcher_can_end_it(llm, words, lavit_tokenizer, features) -> None:
    calls = []

    def watch() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise RequestError("Enough.")

    with pytest.raises(RequestError, match="Enough"):
        generate_codes(llm, words, [[5]], GREEDY, watch=watch)
    calls.clear()
    with pytest.raises(RequestError, match="Enough"):
        generate_text(llm, lavit_tokenizer, *understand_inputs(llm, lavit_tokenizer, features), watch=watch)


def test_damaged_weights_are_named(llm, words) -> None:
    damaged = LlamaForCausalLM(llm.config).eval()
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="up_proj"):
        generate_codes(damaged, words, [[5]], GREEDY)
