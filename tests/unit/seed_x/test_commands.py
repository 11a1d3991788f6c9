"""`seed` commands with a SEED-X folder."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def seed(run_seed, tiny_x_folder):
    """Runs a `seed` command and returns its exit code, its records and stderr."""

    def run(*argv: str) -> tuple[int, list[dict], str]:
        code, lines, errors = run_seed(tiny_x_folder, *argv, "--json")
        return code, [json.loads(line) for line in lines], errors

    return run


def test_ask_with_placeholders_of_images(seed, image):
    question = "What is <image>?"
    _, records, _ = seed("ask", image, image, question, "--max-new-tokens", "8")
    assert [record["question"] for record in records] == [question] * 2
    code, _, errors = seed("ask", image, "<image> or <image>?")
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
