"""`generate`: complete images, token budgets, seeds, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seed_multimodal.errors import GenerationError
from seed_multimodal.language.generation import GenerationSettings, ImageSpans, Prompt, generate

GREEDY = {"do_sample": False}
WILD = {"temperature": 3.0, "top_p": 1.0, "top_k": 0}


def prompt(system: Any, text: str) -> Prompt:
    return Prompt(system.tokenizer.encode_parts([text], add_bos=True))


def run(system: Any, prompts: list[Prompt], settings: GenerationSettings, **how: Any) -> list[list[int]]:
    return generate(system.llm, system.tokenizer, prompts, settings, **how)


def test_generate_equals_transformers(tiny: Any) -> None:
    """Without constraints, greedy and sampled ids equal those of `model.generate`."""
    ids = torch.tensor([prompt(tiny, "What is this animal?").ids])
    for how in (GREEDY, {"temperature": 1.3, "top_p": 0.9, "top_k": 20}):
        settings = GenerationSettings(max_new_tokens=20, constrain=False, seed=7, **how)
        torch.manual_seed(7)
        sampling = {"do_sample": True, **how} if how is not GREEDY else GREEDY
        plain = tiny.llm.generate(ids, max_new_tokens=20, pad_token_id=0, **sampling)[0, ids.shape[1]:].tolist()
        assert run(tiny, [Prompt(ids[0].tolist())], settings)[0] == plain


def test_generate_of_a_batch_equals_its_rows_alone(tiny: Any) -> None:
    prompts = [prompt(tiny, text) for text in ("a", "What is this animal?", "Please draw a fish.")]
    for beams in (1, 3):
        settings = GenerationSettings(max_new_tokens=40, num_beams=beams, **GREEDY)
        assert run(tiny, prompts, settings) == [run(tiny, [one], settings)[0] for one in prompts]


@pytest.mark.parametrize("how", [WILD, {"num_beams": 3, **GREEDY}, {"num_beams": 2, **WILD}])
def test_generate_completes_every_image(tiny: Any, how: dict[str, Any]) -> None:
    words = tiny.tokenizer.vocabulary
    settings = GenerationSettings(max_new_tokens=80, force_image=True, seed=3, **how)
    for ids in run(tiny, [prompt(tiny, "Please draw a fish.")] * 2, settings):
        opened = None
        for place, id in enumerate(ids):
            if id == words.boi_id:
                opened = place
            elif id == words.eoi_id:
                assert opened is not None and place - opened == words.tokens_per_image + 1
                opened = None
            else:
                assert words.is_code_id(id) == (opened is not None)
        assert opened is None


def test_image_spans_start_only_where_an_image_fits(tiny: Any) -> None:
    words = tiny.tokenizer.vocabulary
    scores = torch.zeros(1, words.size)
    for budget, allowed in ((words.image_length, True), (words.image_length - 1, False)):
        masked = ImageSpans(words, budget=budget)(torch.zeros(1, 0, dtype=torch.long), scores)
        assert bool(torch.isfinite(masked[0, words.boi_id])) is allowed


def test_generate_with_too_few_tokens(tiny: Any) -> None:
    with pytest.raises(GenerationError, match="context ends at 512"):
        run(tiny, [Prompt([5] * 600)], GenerationSettings(**GREEDY))
    with pytest.raises(GenerationError, match="An image needs 33 new tokens, but only 20"):
        run(tiny, [Prompt([5] * 491)], GenerationSettings(force_image=True, **GREEDY))
