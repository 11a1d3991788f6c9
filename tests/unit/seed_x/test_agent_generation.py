"""The agent embeds prompts and writes features, on a tiny random LLaMA."""

from __future__ import annotations

import pytest
import tiny_seed_x
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from seed_multimodal.errors import RequestError
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.llama import force_special_ids
from seed_multimodal.language.seed_x import SeedXPrompts
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.seed_x.modeling import ContinuousLVLM, Prompt

PLACES, FEATURES = 16, tiny_seed_x.FEATURES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MultimodalTokenizer:
    return tiny_seed_x.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def agent(tokenizer: MultimodalTokenizer, tmp_path_factory: pytest.TempPathFactory) -> ContinuousLVLM:
    folder = tmp_path_factory.mktemp("llm")
    tiny_seed_x.write_llm(folder, len(tokenizer))
    llm = LlamaForCausalLM.from_pretrained(folder)
    force_special_ids(llm)
    return tiny_seed_x.agent(llm).eval()


def prompts_of(tokenizer: MultimodalTokenizer) -> list[Prompt]:
    """Two with images in different numbers of views, two without."""
    templates, generator, prompts = SeedXPrompts(tokenizer), torch.Generator().manual_seed(5), []
    for text, views in (("What is this animal? It is a cat.", [2]), ("a", []), ("<image> or <image>?", [1, 3]),
                        ("Hello, hello there! What?", [])):
        n = sum(views)
        shown = (torch.randn(n, PLACES, FEATURES, generator=generator), torch.rand(n, 2, generator=generator))
        prompts.append(Prompt(templates.ask(text, views), *(shown if n else ())))
    return prompts


def plain_features(agent: ContinuousLVLM, prompt: Prompt, ids: list[int], tokenizer: MultimodalTokenizer) -> Tensor:
    """Of the images of an answer, by one forward pass over prompt and answer."""
    words, everything = tokenizer.vocabulary, torch.tensor([[*prompt.ids, *ids]])
    mask = torch.zeros_like(everything, dtype=torch.bool)
    mask[0, words.places(prompt.ids)] = True
    with torch.no_grad():
        embeds = agent.embed(everything, mask, prompt.features, prompt.positions)
        states = agent.llm(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, len(prompt.ids):]
        ends = [place for place, id in enumerate(ids) if id == words.eoi_id]
        return torch.cat([agent.output_resampler(states[None, end - 4:end]) for end in ends])


@pytest.mark.parametrize("settings", [
    GenerationSettings(max_new_tokens=30, do_sample=False, force_image=True),
    GenerationSettings(max_new_tokens=16, do_sample=False, num_beams=3, force_image=True),
    GenerationSettings(max_new_tokens=16, seed=3, top_p=1.0, top_k=0, temperature=2.0, force_image=True)])
def test_generate_writes_the_features_of_a_plain_forward(
    agent: ContinuousLVLM, tokenizer: MultimodalTokenizer, settings: GenerationSettings
) -> None:
    prompts = prompts_of(tokenizer)
    answers = agent.generate(prompts, settings, tokenizer)
    assert len({tuple(answer.ids) for answer in answers}) > 1
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = plain_features(agent, prompt, answer.ids, tokenizer)
        assert len(answer.features) >= 1 and torch.allclose(answer.features, expected, atol=2e-5)
        alone = agent.generate([prompt], settings, tokenizer)[0]
        assert alone.ids == answer.ids and torch.allclose(alone.features, answer.features, atol=2e-5)


def test_embed_prompts_puts_features_and_centres_in_their_places(
    agent: ContinuousLVLM, tokenizer: MultimodalTokenizer
) -> None:
    first, second, third, _ = prompts_of(tokenizer)
    rows = agent.embed_prompts([first, second, third], tokenizer)
    plain = agent.llm.get_input_embeddings()(torch.tensor(third.ids))
    changed = (rows[2] != plain).any(1).nonzero().flatten().tolist()
    assert changed == tokenizer.vocabulary.places(third.ids) and len(changed) == 16
    assert torch.equal(rows[1], agent.llm.get_input_embeddings()(torch.tensor(second.ids)))
    assert third.features is not None and third.positions is not None
    for other in (Prompt(third.ids, third.features.flip(0), third.positions),
                  Prompt(third.ids, third.features, third.positions.flip(0))):
        assert not torch.allclose(agent.embed_prompts([other], tokenizer)[0], rows[2], atol=1e-3)
    some = agent.embed_prompts([Prompt(third.ids, third.features[:1], third.positions[:1], changed[:4])], tokenizer)[0]
    assert torch.allclose(some[changed[:4]], rows[2][changed[:4]], atol=1e-5)
    assert torch.equal(some[changed[4:]], plain[changed[4:]])  # `places`: the others keep their own embeddings
    with pytest.raises(RequestError, match="Prompt 1 has places for 2 views of images, but there are features of 0"):
        agent.embed_prompts([second, Prompt(first.ids)], tokenizer)
