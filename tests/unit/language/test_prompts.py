"""Templates: a longer dialogue begins with a shorter one's ids (their strings: golden kinds
`conversation` and `scripts`)."""

import pytest

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TEMPLATES, get_template

CODES = [1, 2, 3, 4, 5]
DIALOGUE = [
    ("user", [CODES, "What is it?"]),
    ("assistant", "A cat."),
    ("user", "Draw it."),
    ("assistant", ["Here.", CODES]),
    ("user", ["And ", "again?"]),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_render_of_each_template(name, tokenizer):
    template = get_template(name)
    # An answer ends where the model begins the next turn.
    for stop in template.stop_sequences:
        assert stop.startswith("\n") and template.render(DIALOGUE[:3])[-1].startswith(stop)
    # The engine keeps what it has read of a conversation.
    ids = [tokenizer.encode_parts(template.render(DIALOGUE[:n])) for n in range(1, 6)]
    for shorter, longer in zip(ids, ids[1:], strict=False):
        assert longer[: len(shorter)] == shorter


def test_get_template_of_an_unknown_name(tokenizer):
    with pytest.raises(ConfigError, match="vicuna"):
        get_template("alpaca")
    with pytest.raises(ConfigError):  # LLaMA's tokenizer has no chat template
        get_template("chat", tokenizer)
