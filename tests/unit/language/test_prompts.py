"""Templates: the original strings; the ids of a longer dialogue start with those of a shorter
one."""

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


def test_render_of_each_template():
    assert get_template("plain").render([("user", ["a ", CODES, "b"])]) == ["a ", CODES, "b"]
    template = get_template("vicuna")
    assert template.render(DIALOGUE[:1]) == ["USER: ", CODES, "What is it?\nASSISTANT:"]
    assert template.render(DIALOGUE) == [
        "USER: ",
        CODES,
        "What is it?\nASSISTANT:",
        "A cat.",
        "\nUSER: Draw it.\nASSISTANT:",
        "Here.",
        CODES,
        "\nUSER: And again?\nASSISTANT:",
    ]
    assert template.render(DIALOGUE[2:3], system="Be kind.") == [
        "Be kind.\nUSER: Draw it.\nASSISTANT:"
    ]
    template = get_template("llama2")
    assert template.render(DIALOGUE[:1]) == ["[INST] ", CODES, "What is it? [/INST]\n"]
    assert template.render(DIALOGUE[:3])[-1] == "\n[INST] Draw it. [/INST]\n"
    assert template.render(DIALOGUE[2:3], "Be kind.") == [
        "<<SYS>>\nBe kind.\n<</SYS>>\n\n[INST] Draw it. [/INST]\n"
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_render_of_longer_dialogues(name, tokenizer: MultimodalTokenizer):
    template = get_template(name)
    ids = [tokenizer.encode_parts(template.render(DIALOGUE[:n])) for n in (1, 2, 3, 4, 5)]
    assert all(
        longer[: len(shorter)] == shorter for shorter, longer in zip(ids, ids[1:], strict=False)
    )


def test_stop_sequences_are_the_opening_of_the_next_turn():
    stops = {name: template.stop_sequences for name, template in TEMPLATES.items()}
    assert stops == {"vicuna": ("\nUSER:",), "llama2": ("\n[INST]",), "plain": ()}


def test_get_template_of_an_unknown_name():
    with pytest.raises(ConfigError, match="vicuna, llama2, plain"):
        get_template("alpaca")
