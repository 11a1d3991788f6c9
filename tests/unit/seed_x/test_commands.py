"""`seed` commands with a SEED-X folder."""

import json
from pathlib import Path

import pytest


def test_ask_with_placeholders_of_images(run_seed, tiny_x_folder, image):
    question = "What is <image>?"
    flags = ("--max-new-tokens", "8", "--json")
    _, lines, _ = run_seed(tiny_x_folder, "ask", image, image, question, *flags)
    assert [json.loads(line)["question"] for line in lines] == [question] * 2
    code, _, errors = run_seed(tiny_x_folder, "ask", image, "<image> or <image>?")
    assert code == 1
    assert "<image>" in errors


def test_encode_of_a_number_of_embeddings(tiny_x, image):
    # Fewer embeddings for longer prompts; their number is checked.
    from seed_multimodal.errors import ConfigError

    count = tiny_x.images.encode([Path(image)]).shape[1]
    assert tiny_x.images.encode([Path(image)], count // 2).shape[1] == count // 2
    for wrong in (0, count + 1):
        with pytest.raises(ConfigError, match="embeddings"):
            tiny_x.images.encode([Path(image)], wrong)
