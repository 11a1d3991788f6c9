"""The agent on a tiny random LLaMA: losses, gradients in every kind of batch, pictures that equal a plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import ConfigError, DataError, GenerationError, RequestError
from seed_multimodal.language.answer import BrokenImagePart, ImagePart, TextPart, split_answer
from seed_multimodal.language.continuous import AgentSettings, ContinuousLVLM, Prompt
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.llama import force_special_ids
from seed_multimodal.language.seed_x import SeedXPrompts, ShownPicture, WrittenPicture
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.vision.resampler import Resampler, ResamplerConfig

WIDTH, FEATURES, PLACES = 32, 16, 16
GREEDY = GenerationSettings(max_new_tokens=30, do_sample=False)


def make_agent(tokenizer: MultimodalTokenizer, seed: int = 0, **settings: Any) -> ContinuousLVLM:
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=160))
    force_special_ids(llm)
    agent = ContinuousLVLM(llm, Resampler(ResamplerConfig(2, WIDTH, 4, FEATURES)),
                           Resampler(ResamplerConfig(2, FEATURES, 4, WIDTH)), AgentSettings(**settings))
    for parameter in agent.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    return agent.eval()


@pytest.fixture(scope="module")
def agent(seedx_tokenizer: MultimodalTokenizer) -> ContinuousLVLM:
    return make_agent(seedx_tokenizer)


@pytest.fixture(scope="module")
def eager(seedx_tokenizer: MultimodalTokenizer) -> ContinuousLVLM:
    """Very fond of image words: it would write them anywhere."""
    agent = make_agent(seedx_tokenizer)
    words = seedx_tokenizer.vocabulary
    with torch.no_grad():
        agent.llm.lm_head.weight[:words.n_text] *= 0.5
        agent.llm.lm_head.weight[words.n_text:] *= 2
    return agent


def batch_of(tokenizer: MultimodalTokenizer, read: int, written: int, seed: int = 1) -> dict[str, Any]:
    """One row: pictures that are read, words, pictures that are written; one more that is left out."""
    words = tokenizer.vocabulary
    ids, cmp, gen = [1], [False], [False]
    for _ in range(read):
        part = [*words.read_ids(2)]
        cmp += [words.is_code_id(id) for id in part]
        gen += [False] * len(part)
        ids += part
    text = tokenizer.encode("It is a cat.")
    ids, cmp, gen = ids + text, cmp + [False] * len(text), gen + [False] * len(text)
    for _ in range(written):
        ids, cmp = ids + words.run(), cmp + [False] * 6
        gen += [False, True, True, True, True, False]
    ids, cmp, gen = [*ids, 2], [*cmp, False], [*gen, False]
    generator = torch.Generator().manual_seed(seed)
    n = 2 * read + written + 1
    rows = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "labels": torch.tensor([[-100 if c or g else id for id, c, g in zip(ids, cmp, gen, strict=True)]]),
            "ids_cmp_mask": torch.tensor([cmp]), "ids_gen_mask": torch.tensor([gen])}
    return {**rows, "image_embeds": torch.randn(n, PLACES, FEATURES, generator=generator),
            "patch_positions": torch.rand(n, 2, generator=generator),
            "embeds_cmp_mask": torch.tensor([place < 2 * read for place in range(n)]),
            "embeds_gen_mask": torch.tensor([2 * read <= place < n - 1 for place in range(n)])}


# ---- training


@pytest.mark.parametrize(("read", "written"), [(1, 1), (2, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("pictures", [True, False])
def test_every_parameter_gets_a_gradient_in_every_batch(
    agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer, read: int, written: int, pictures: bool
) -> None:
    batch = batch_of(seedx_tokenizer, read, written)
    if not pictures:
        if read or written:
            return
        batch |= dict.fromkeys(("image_embeds", "patch_positions", "embeds_cmp_mask", "embeds_gen_mask"))
    agent.zero_grad(set_to_none=True)
    before = torch.get_rng_state()
    losses = agent(**batch)
    losses["total_loss"].backward()
    assert torch.equal(before, torch.get_rng_state())  # the stand-ins draw nothing
    expected = losses["lm_loss"] + 6 * losses["rec_loss"]
    assert torch.allclose(losses["total_loss"], expected) and bool(losses["lm_loss"] > 0)
    assert bool(losses["rec_loss"] > 0) == bool(written)
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is None) == name.endswith("pos_embed") or name == "patch_pos_embed", name
        used = read if name.startswith(("input", "patch")) else written if name.startswith("output") else 1
        if parameter.grad is not None:
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.abs().sum() > 0) == bool(used), name


def test_losses_are_the_plain_ones(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    """Against transformers' own loss, and the mean squared distance written out."""
    batch = batch_of(seedx_tokenizer, 1, 1)
    losses = agent(**batch)
    read = agent.input_resampler(batch["image_embeds"][:2])
    x = batch["patch_positions"][:2]
    place = 0.5 * (x[:, :1] * agent.patch_pos_embed[0] + x[:, 1:] * agent.patch_pos_embed[1]
                   + (1 - x[:, :1]) * agent.patch_pos_embed[2] + (1 - x[:, 1:]) * agent.patch_pos_embed[3])
    embeds = agent.llm.get_input_embeddings()(batch["input_ids"]).clone()
    embeds[batch["ids_cmp_mask"]] = (read + place[:, None]).flatten(0, 1)
    output = agent.llm(inputs_embeds=embeds, labels=batch["labels"], output_hidden_states=True)
    assert torch.allclose(losses["lm_loss"], output.loss, atol=1e-6)
    written = agent.output_resampler(output.hidden_states[-1][batch["ids_gen_mask"]][None])
    target = batch["image_embeds"][2].reshape(4, 4, FEATURES).mean(1)  # 4 neighbours in a row, not 2 x 2
    assert torch.allclose(losses["rec_loss"], ((written[0] - target) ** 2).mean(), atol=1e-6)


def test_padding_on_the_right_changes_nothing(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    batch = batch_of(seedx_tokenizer, 1, 1)
    padded = {**batch, **{name: torch.nn.functional.pad(batch[name], (0, 7), value=fill) for name, fill in (
        ("input_ids", 0), ("attention_mask", 0), ("labels", -100), ("ids_cmp_mask", False), ("ids_gen_mask", False))}}
    for name, value in agent(**batch).items():
        assert torch.allclose(value, agent(**padded)[name], atol=1e-6)


def test_nothing_learned_is_no_nan(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    batch = batch_of(seedx_tokenizer, 1, 0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert agent(**batch)["total_loss"].item() == 0.0


def test_wrong_counts_in_a_batch(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message):
            agent(**{**batch_of(seedx_tokenizer, 1, 1), **changes})

    false, true = torch.tensor([False] * 4), torch.tensor([True, True, True, False])
    refused("8 image words of pictures that are read, but features for 0", embeds_cmp_mask=false)
    refused("8 image words of pictures that are read, but features for 12", embeds_cmp_mask=true)
    refused("4 image words of pictures that are written, but features for 0", embeds_gen_mask=false)
    refused("3 pictures to write, but 4 image words", embeds_gen_mask=true)
    refused("2 views need the place of each, not none", patch_positions=None)


def test_features_that_do_not_fit(seedx_tokenizer: MultimodalTokenizer) -> None:
    agent = make_agent(seedx_tokenizer, vit_down=False)
    with pytest.raises(ConfigError, match=r"gives \[1, 4, 16\], but the features to be written are \[1, 16, 16\]"):
        agent(**batch_of(seedx_tokenizer, 0, 1))
    with pytest.raises(ConfigError, match="lm_loss_scale"):
        AgentSettings(lm_loss_scale=-1)


def with_lora(tokenizer: MultimodalTokenizer) -> ContinuousLVLM:
    agent = make_agent(tokenizer)
    agent.llm = get_peft_model(agent.llm, LoraConfig(r=2, target_modules=["q_proj", "down_proj"],
                                                     task_type="CAUSAL_LM", modules_to_save=["norm"]))
    agent.llm.get_input_embeddings().requires_grad_(True)
    enable = getattr(agent.llm, "activation_checkpointing_enable", None) or agent.llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return agent.train()


def test_a_lora_learns_and_answers(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    """As in instruction tuning: a LoRA, the norms and the words, with checkpointed activations."""
    tuned, batch = with_lora(seedx_tokenizer), batch_of(seedx_tokenizer, 1, 1)
    losses = tuned(**batch)
    assert torch.allclose(losses["total_loss"], agent(**batch)["total_loss"], atol=1e-6)  # a fresh LoRA changes nothing
    losses["total_loss"].backward()
    for name, parameter in tuned.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    prompts = prompts_of(seedx_tokenizer)
    settings = GenerationSettings(max_new_tokens=8, do_sample=False, force_image=True)
    for one, other in zip(tuned.eval().generate(prompts, settings, seedx_tokenizer),
                          agent.generate(prompts, settings, seedx_tokenizer), strict=True):
        assert one.ids == other.ids and torch.allclose(one.features, other.features, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer, autocast: bool) -> None:
    """A language model in bf16 beside resamplers in fp32, and everything in fp32 under autocast."""
    other = make_agent(seedx_tokenizer)
    if not autocast:
        other.llm.bfloat16()
    for read, written in ((1, 1), (0, 0)):
        batch = batch_of(seedx_tokenizer, read, written)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = other(**batch)
        exact = agent(**batch)
        assert losses["total_loss"].dtype == torch.float32
        assert torch.allclose(losses["total_loss"], exact["total_loss"], rtol=0.05)
        losses["total_loss"].backward()
    settings = GenerationSettings(max_new_tokens=6, do_sample=False, force_image=True)
    answer = other.generate(prompts_of(seedx_tokenizer), settings, seedx_tokenizer)[0]
    assert answer.features.shape == (1, 4, FEATURES) and bool(torch.isfinite(answer.features).all())


# ---- generation


def prompts_of(tokenizer: MultimodalTokenizer) -> list[Prompt]:
    """Two with pictures in different numbers of views, two without."""
    asks, generator = SeedXPrompts(tokenizer), torch.Generator().manual_seed(5)
    made = []
    for text, views in (("What is this animal? It is a cat.", [2]), ("a", []), ("<image> or <image>?", [1, 3]),
                        ("Hello, hello there! What?", [])):
        n = sum(views)
        shown = (torch.randn(n, PLACES, FEATURES, generator=generator), torch.rand(n, 2, generator=generator))
        made.append(Prompt(asks.ask(text, views), *(shown if n else ())))
    return made


def plain_features(agent: ContinuousLVLM, prompt: Prompt, ids: list[int], tokenizer: MultimodalTokenizer) -> Tensor:
    """Of the pictures of an answer, by one forward pass over prompt and answer."""
    words = tokenizer.vocabulary
    everything = torch.tensor([[*prompt.ids, *ids]])
    mask = torch.zeros_like(everything, dtype=torch.bool)
    mask[0, words.places(prompt.ids)] = True
    with torch.no_grad():
        embeds = agent.embed(everything, mask, prompt.features, prompt.positions)
        states = agent.llm(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, len(prompt.ids):]
        ends = [place for place, id in enumerate(ids) if id == words.eoi_id]
        return torch.cat([agent.output_resampler(states[None, end - 4:end]) for end in ends])


@pytest.mark.parametrize("settings", [
    GenerationSettings(max_new_tokens=30, do_sample=False, force_image=True),
    GenerationSettings(max_new_tokens=30, do_sample=False, num_beams=3, force_image=True),
    GenerationSettings(max_new_tokens=30, seed=3, top_p=1.0, top_k=0, temperature=2.0, force_image=True),
    GenerationSettings(max_new_tokens=24, seed=3, top_p=1.0, top_k=0, num_beams=2, force_image=True),
    GenerationSettings(max_new_tokens=30, do_sample=False),
    GenerationSettings(max_new_tokens=16, seed=1, num_beams=3, force_image=True)])
def test_pictures_are_whole_and_equal_a_plain_forward(
    eager: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer, settings: GenerationSettings
) -> None:
    words = seedx_tokenizer.vocabulary
    prompts, found = prompts_of(seedx_tokenizer), 0
    for prompt, answer in zip(prompts, eager.generate(prompts, settings, seedx_tokenizer), strict=True):
        assert not [part for part in answer.parts if isinstance(part, BrokenImagePart)], answer.ids
        pictures = [part for part in answer.parts if isinstance(part, ImagePart)]
        assert all(answer.ids[part.place - 1:part.place + 5] == words.run() for part in pictures)
        assert sum(map(words.is_image_word, answer.ids)) == 6 * len(pictures)  # none outside a run
        assert len(answer.features) == len(pictures) >= settings.force_image
        if pictures:
            expected = plain_features(eager, prompt, answer.ids, seedx_tokenizer)
            assert torch.allclose(answer.features, expected, atol=2e-5)
        found += len(pictures)
    assert found


@pytest.mark.parametrize("settings", [GREEDY, GenerationSettings(max_new_tokens=20, seed=2, top_p=1.0),
                                      GenerationSettings(max_new_tokens=20, do_sample=False, num_beams=2)])
def test_equal_alone_and_in_a_batch(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer,
                                    settings: GenerationSettings) -> None:
    prompts = prompts_of(seedx_tokenizer)
    together = agent.generate(prompts, settings, seedx_tokenizer)
    alone = [agent.generate([prompt], settings, seedx_tokenizer)[0] for prompt in prompts]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({tuple(answer.ids) for answer in alone}) > 1
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.features, other.features, atol=2e-5)


def test_the_picture_matters(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    prompt = prompts_of(seedx_tokenizer)[2]
    assert prompt.features is not None and prompt.positions is not None
    before = agent.generate([prompt], GREEDY, seedx_tokenizer)[0].ids
    for other in (Prompt(prompt.ids, prompt.features.flip(0), prompt.positions),
                  Prompt(prompt.ids, prompt.features, prompt.positions.flip(0))):
        assert agent.generate([other], GREEDY, seedx_tokenizer)[0].ids != before


def test_the_released_rule_may_break_off_and_ours_does_not(
    eager: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer
) -> None:
    prompt = prompts_of(seedx_tokenizer)[1]
    words = seedx_tokenizer.vocabulary
    forced = Prompt([*prompt.ids, words.boi_id])
    cut = eager.generate([forced], GenerationSettings(max_new_tokens=3, do_sample=False), seedx_tokenizer,
                         released=True)[0]
    assert cut.ids == words.run()[1:4] and len(cut.features) == 0
    assert cut.parts == [BrokenImagePart(words.run()[:4], "A picture broke off after 3 of 4 codes.")]
    assert cut.text == "<img_00000> <img_00001> <img_00002>"
    ours = eager.generate([prompt], GenerationSettings(max_new_tokens=6, do_sample=False, force_image=True),
                          seedx_tokenizer)[0]
    same = eager.generate([forced], GenerationSettings(max_new_tokens=6, do_sample=False), seedx_tokenizer)[0]
    assert ours.ids == [words.boi_id, *same.ids] and torch.equal(ours.features, same.features)
    with pytest.raises(GenerationError, match="A picture needs 5 new tokens, but only 3 are left"):
        eager.generate([prompt], GenerationSettings(max_new_tokens=3, force_image=True), seedx_tokenizer)


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_draw_although_the_image_words_were_never_learned(
    seedx_tokenizer: MultimodalTokenizer, beams: int
) -> None:
    """Trained models give the words inside a run no probability; a beam with a picture must not lose by that."""
    agent, words = make_agent(seedx_tokenizer), seedx_tokenizer.vocabulary
    plain = agent.llm.lm_head.forward
    inside = torch.zeros(len(seedx_tokenizer))
    inside[words.run()[1:]] = -50.0
    fond = torch.zeros(len(seedx_tokenizer))
    fond[words.boi_id] = 30.0
    agent.llm.lm_head.forward = lambda states: plain(states) + inside + fond  # type: ignore[method-assign]
    prompt = prompts_of(seedx_tokenizer)[1]
    for count in (1, beams):
        settings = GenerationSettings(max_new_tokens=8, do_sample=False, num_beams=count)
        answer = agent.generate([prompt], settings, seedx_tokenizer)[0]
        assert answer.ids[:6] == words.run() and len(answer.features) == 1


def test_streaming_and_stopping(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    class Stop(Exception):
        pass

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    prompt, streamer, calls = prompts_of(seedx_tokenizer)[0], Streamer(), []
    answer = agent.generate([prompt], GREEDY, seedx_tokenizer, streamer=streamer)[0]
    assert streamer.seen == [*prompt.ids, *answer.ids, -1]

    def watch() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Stop

    hooks = len(agent.llm.model._forward_hooks)
    with pytest.raises(Stop):
        agent.generate([prompt], GREEDY, seedx_tokenizer, watch=watch)
    assert len(agent.llm.model._forward_hooks) == hooks  # nothing goes on listening


def test_a_conversation_after_a_drawn_picture(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    """The drawn one's words keep their own embeddings, as when it was written: the states there are those of then."""
    asks = SeedXPrompts(seedx_tokenizer)
    shown = torch.randn(2, PLACES, FEATURES), torch.rand(2, 2)
    turns: list[Any] = [("user", [ShownPicture(2), "a"])]
    first = Prompt(asks.dialogue(turns), *shown)
    drawn = agent.generate([first], GenerationSettings(max_new_tokens=6, force_image=True), seedx_tokenizer)[0]
    turns += [("assistant", [WrittenPicture()]), ("user", ["What?"])]
    ids = asks.dialogue(turns)
    second = Prompt(ids, *shown, places=asks.places(ids, turns))
    assert len(second.places or []) == 8 and ids[:len(first.ids) + 5] == [*first.ids, *drawn.ids[:5]]
    with torch.no_grad():
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        mask[0, list(second.places or [])] = True
        states = agent.states(agent.embed(torch.tensor([ids]), mask, *shown), None)
        written = agent.output_resampler(states[:, len(first.ids) + 1:len(first.ids) + 5])
    assert torch.allclose(written, drawn.features, atol=2e-5)
    assert agent.generate([second], GREEDY, seedx_tokenizer)[0].ids
    with pytest.raises(RequestError, match="places for 3 views of pictures, but there are features of 2"):
        agent.generate([Prompt(ids, *shown)], GREEDY, seedx_tokenizer)


def test_wrong_pictures_of_a_prompt(agent: ContinuousLVLM, seedx_tokenizer: MultimodalTokenizer) -> None:
    first, second = prompts_of(seedx_tokenizer)[:2]

    def refused(prompt: Prompt, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            agent.generate([second, prompt], GREEDY, seedx_tokenizer)

    refused(Prompt(first.ids), "Prompt 1 has places for 2 views of pictures, but there are features of 0")
    refused(Prompt(first.ids, first.features[:1], first.positions[:1]), "features of 1")
    refused(Prompt(second.ids, first.features, first.positions), "places for 0 views")
    refused(Prompt(first.ids, first.features), "needs the place of each")
    refused(Prompt(first.ids[:5], first.features), "not the 4 of a whole view")


def test_broken_answers_are_named(seedx_tokenizer: MultimodalTokenizer) -> None:
    words, cat = seedx_tokenizer.vocabulary, seedx_tokenizer.encode("a cat")

    def reasons(ids: list[int]) -> list[str]:
        return [part.reason for part in split_answer(ids, seedx_tokenizer) if isinstance(part, BrokenImagePart)]

    run = words.run()
    assert reasons([*cat, words.eoi_id]) == ["Image words without an opening <img>."]  # spontaneous
    assert reasons([*cat, *run[:4]]) == ["A picture broke off after 3 of 4 codes."]
    assert reasons([run[0], run[2], run[1], *run[3:]]) == ["The words of a picture are not in their order."]
    assert split_answer([*cat, *run, *cat], seedx_tokenizer) == [
        TextPart("a cat"), ImagePart([0, 1, 2, 3]), TextPart("a cat")]
