"""Templates: the original strings; a longer dialogue begins with a shorter one's ids."""

from __future__ import annotations

import pytest

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import TEMPLATES, get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

CODES = [1, 2, 3, 4, 5]
DIALOGUE = [
    ("user", [CODES, "What is it?"]),
    ("assistant", "A cat."),
    ("user", "Draw it."),
    ("assistant", ["Here.", CODES]),
    ("user", ["And ", "again?"]),
]
# What a template writes of the first turns, and of one question behind a system message.
RENDERED = {
    "plain": ([CODES, "What is it?"], None),
    "vicuna": (
        ["USER: ", CODES, "What is it?\nASSISTANT:", "A cat.", "\nUSER: Draw it.\nASSISTANT:"],
        "Be kind.\nUSER: Draw it.\nASSISTANT:",
    ),
    "llama2": (
        ["[INST] ", CODES, "What is it? [/INST]\n", "A cat.", "\n[INST] Draw it. [/INST]\n"],
        "<<SYS>>\nBe kind.\n<</SYS>>\n\n[INST] Draw it. [/INST]\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_render_of_each_template(name, tokenizer: MultimodalTokenizer):
    template = get_template(name)
    turns, with_system = RENDERED[name]
    assert template.render(DIALOGUE[: 1 if name == "plain" else 3]) == turns
    if with_system is not None:
        assert template.render(DIALOGUE[2:3], system="Be kind.") == [with_system]
        # An answer ends where the model begins the next turn.
        [stop] = template.stop_sequences
        assert stop.startswith("\n") and turns[-1].startswith(stop)
    # The engine keeps what it has read of a conversation.
    ids = [tokenizer.encode_parts(template.render(DIALOGUE[:n])) for n in range(1, 6)]
    for shorter, longer in zip(ids, ids[1:], strict=False):
        assert longer[: len(shorter)] == shorter


def test_get_template_of_an_unknown_name(tokenizer: MultimodalTokenizer):
    with pytest.raises(ConfigError, match="vicuna"):
        get_template("alpaca")
    with pytest.raises(ConfigError):  # LLaMA's tokenizer has no chat template
        get_template("chat", tokenizer)
