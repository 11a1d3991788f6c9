"""The decoder `chat`: prompt templates, and which tokens are labels."""

from __future__ import annotations

from typing import Any

import pytest

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom, TrainingSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

RNG = SeededRandom(0)


@pytest.fixture(scope="module")
def image(tokenizer: MultimodalTokenizer) -> list[int]:
    return list(range(tokenizer.vocabulary.tokens_per_image))


def talk(*turns: Any) -> dict[str, Any]:
    """A record of turns, starting with the user's."""
    return {
        "messages": [
            {
                "role": ("user", "assistant")[n % 2],
                "content": [turn] if isinstance(turn, str) else turn,
            }
            for n, turn in enumerate(turns)
        ]
    }


def decoded(
    tokenizer: MultimodalTokenizer, fields: dict[str, Any], **options: Any
) -> TrainingSequence:
    sequence = get_decoder("chat", tokenizer, options).decode(fields, RNG)
    assert not sequence.drop_reason and len(sequence.ids) == len(sequence.labels)
    return sequence


def learned(tokenizer: MultimodalTokenizer, sequence: TrainingSequence) -> list[int]:
    pairs = zip(sequence.labels, sequence.ids, strict=True)
    assert all(label in (IGNORE_INDEX, tokenizer.eos_token_id, id) for label, id in pairs)
    return [label for label in sequence.labels if label != IGNORE_INDEX]


@pytest.mark.parametrize("template", ["vicuna", "llama2", "plain"])
def test_decode_encodes_the_prompt_as_at_inference(tokenizer, image, template):
    turns = [
        ("user", [image, "  what is it? "]),
        ("assistant", ["a cat"]),
        ("user", ["draw a dog"]),
    ]
    prompt = tokenizer.encode_parts(get_template(template).render(turns), add_bos=True)
    answer = tokenizer.encode_parts(["here", image])
    fields = {
        "messages": [
            *(
                {
                    "role": role,
                    "content": [
                        part if isinstance(part, str) else {"codes": part} for part in content
                    ],
                }
                for role, content in turns
            ),
            {"role": "assistant", "content": ["here ", {"codes": image}]},
        ]
    }
    sequence = decoded(tokenizer, fields, template=template)
    end = (
        [] if template == "plain" else [tokenizer.eos_token_id]
    )  # the next turn follows without it
    assert sequence.ids == [*prompt, *answer, tokenizer.eos_token_id]
    assert learned(tokenizer, sequence) == [
        *tokenizer.encode("a cat"),
        *end,
        *answer,
        tokenizer.eos_token_id,
    ]
    assert sequence.ids.count(tokenizer.eos_token_id) == 1


def test_decode_every_answer_has_the_end_token_as_label(tokenizer):
    sequence = decoded(tokenizer, talk("q", "a cat", "and now", "a dog", "and now", "a fox"))
    after_answers = [
        index for index, label in enumerate(sequence.labels) if label == tokenizer.eos_token_id
    ]
    assert len(after_answers) == 3
    separator = tokenizer.encode_parts([get_template("vicuna").turn_marker], strip=False)
    for index in after_answers[:-1]:
        assert sequence.ids[index : index + len(separator)] == separator


def test_decode_system_message(tokenizer):
    plain = decoded(tokenizer, talk("q", "a"))
    brief = decoded(tokenizer, {**talk("q", "a"), "system": "Be brief."})
    assert brief.ids != plain.ids and learned(tokenizer, brief) == learned(tokenizer, plain)
    assert tokenizer.decode(brief.ids).replace(" ", "").startswith("<s>Bebrief.\nUSER:q")


def test_decode_selects_a_view(tokenizer, image):
    views = [image, image[::-1]]
    sequences = {
        tuple(
            get_decoder("chat", tokenizer, {})
            .decode(talk([{"codes": views}, "q"], "a"), SeededRandom(seed))
            .ids
        )
        for seed in range(20)
    }
    assert sequences == {
        tuple(decoded(tokenizer, talk([{"codes": view}, "q"], "a")).ids) for view in views
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, r"messages: missing; decoder chat needs it\."),
        (
            talk([{"image": "cat.png"}, "q"], "a"),
            r"messages\[0\]\.content\[0\]: must be .* tokenize the data first",
        ),
        (
            talk(["see", {"codes": [99999]}], "a"),
            r"messages\[0\]\.content\[1\]\.codes: image codes are 0 to",
        ),
        (
            talk(["see", {"codes": [1]}], "a"),
            r"content\[1\]\.codes: an image has \d+ codes, not 1\.",
        ),
    ],
)
def test_decode_broken_records(tokenizer, fields, sentence):
    with pytest.raises(BadRecord, match=sentence):
        decoded(tokenizer, fields)
