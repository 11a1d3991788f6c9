"""The seed of LaVIT's tasks, on a tiny random model."""

from __future__ import annotations

import torch
from random_images import noise

from seed_multimodal.language.messages import user_message
from seed_multimodal.models.lavit.pipeline import Lavit


def test_describe_without_seed_encodes_as_chat(tiny_lavit: Lavit):
    image = noise(1)
    messages = [{"role": "user", "content": [image]}]
    descriptions: list[str] = []
    for torch_seed in range(4):
        torch.manual_seed(torch_seed)
        descriptions.append(tiny_lavit.describe(image, seed=None))
        torch.manual_seed(torch_seed)
        assert tiny_lavit.chat(messages, seed=None).text == descriptions[-1]
    assert len(set(descriptions)) > 1
    assert tiny_lavit.describe(image) == tiny_lavit.describe(image, seed=0)


def test_generate_answers_encodes_with_the_seed_of_its_settings(tiny_lavit: Lavit):
    image = noise(1)
    expected = [tiny_lavit.describe(image, seed=seed) for seed in range(4)]
    answers: list[str] = []
    for seed in range(4):
        settings = tiny_lavit.settings("describe", seed=seed)
        generated = tiny_lavit.generate_answers([user_message([image])], "describe", settings)
        answers.append(generated[0].answer.text)
    assert len(set(expected)) > 1
    assert answers == expected
