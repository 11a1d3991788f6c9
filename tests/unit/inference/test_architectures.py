"""`TorchBackend` with other decoder-only models: ids as transformers' `generate`, or an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from reference_generation import generate
from tiny.language import ARCHITECTURES, random_llm

from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

GREEDY = GenerationSettings(max_new_tokens=30, do_sample=False)
SETTINGS = {
    "greedy": GREEDY,
    "sampled": GenerationSettings(max_new_tokens=30, temperature=1.0, top_k=0, top_p=0.9),
    "beams of an image": replace(GREEDY, num_beams=3, force_image=True, max_new_tokens=40),
}
TEXTS = ("a", "What is this animal?", "Where is the cat that was here? Please draw a fish.")
SEEDS = [3, 2, 1]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_equals_transformers(tiny: Any, architecture, settings):
    tokenizer = tiny.tokenizer
    llm = random_llm(architecture, len(tokenizer))
    prompts = [Prompt(tokenizer.encode_parts([text], add_bos=True)) for text in TEXTS]
    expected = generate(llm, tokenizer, prompts, settings, seeds=SEEDS)
    engine = Engine(TorchBackend(llm, max_rows=16), tokenizer)
    assert engine.generate(prompts, settings, seeds=SEEDS) == expected


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("granite", {"logits_scaling": 8.0}, "wrong scores"),
        ("bloom", {}, "type bloom"),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
            "type gpt_neo",
        ),
    ],
)
def test_backend_of_an_unknown_architecture(tiny: Any, architecture, fields, message):
    llm = random_llm(architecture, len(tiny.tokenizer), **fields)
    with pytest.raises(ConfigError, match=message):
        TorchBackend(llm, max_rows=1)
