"""The decoder `chat`: prompt templates, and what is learned."""

from __future__ import annotations

from typing import Any

import pytest

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import IGNORED, SeededRandom, TokenSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

DRAWS = SeededRandom(0)


@pytest.fixture(scope="module")
def image(words: MultimodalTokenizer) -> list[int]:
    return list(range(words.vocabulary.tokens_per_image))


def talk(*turns: Any) -> dict[str, Any]:
    """A record of turns, the user's first."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": [turn] if isinstance(turn, str) else turn}
                         for n, turn in enumerate(turns)]}


def made(words: MultimodalTokenizer, fields: dict[str, Any], **options: Any) -> TokenSequence:
    sequence = get_decoder("chat", words, options).decode(fields, DRAWS)
    assert not sequence.dropped and len(sequence.ids) == len(sequence.labels)
    return sequence


def learned(sequence: TokenSequence) -> list[int]:
    assert all(label in (IGNORED, id) for label, id in zip(sequence.labels, sequence.ids, strict=True))
    return [label for label in sequence.labels if label != IGNORED]


# ---- ids and labels


@pytest.mark.parametrize("template", ["vicuna", "llama2", "plain"])
def test_ids_are_those_of_the_prompt_at_inference(words, image, template):
    turns = [("user", [image, "  what is it? "]), ("assistant", ["a cat"]), ("user", ["draw a dog"])]
    prompt = words.encode_parts(get_template(template).render(turns), add_bos=True)
    answer = words.encode_parts(["here", image])
    fields = {"messages": [*({"role": role, "content": [part if isinstance(part, str) else {"codes": part}
                                                        for part in content]} for role, content in turns),
                           {"role": "assistant", "content": ["here ", {"codes": image}]}]}
    every = made(words, fields, template=template)
    end = words.encode_parts([get_template(template).turn_marker], strip=False)  # where a system stops
    assert every.ids == [*prompt, *answer, words.eos_id]
    assert learned(every) == [*words.encode("a cat"), *end, *answer, words.eos_id]
    assert bool(end) == (template != "plain")
    assert every.ids.count(words.eos_id) == 1


def test_system_message_of_a_record(words):
    plain, own = made(words, talk("q", "a")), made(words, {**talk("q", "a"), "system": "Be brief."})
    assert own.ids != plain.ids and learned(own) == learned(plain)
    assert words.decode(own.ids).replace(" ", "").startswith("<s>Bebrief.\nUSER:q")


# ---- images


def test_a_view_is_drawn(words, image):
    views = [image, image[::-1]]
    found = {tuple(get_decoder("chat", words, {}).decode(talk([{"codes": views}, "q"], "a"), SeededRandom(seed)).ids)
             for seed in range(20)}
    assert found == {tuple(made(words, talk([{"codes": view}, "q"], "a")).ids) for view in views}


@pytest.mark.parametrize(("fields", "sentence"), [
    ({}, r"messages: missing; decoder chat needs it\."),
    (talk([{"image": "cat.png"}, "q"], "a"), r"messages\[0\]\.content\[0\]: must be .* tokenize the data first"),
    (talk(["see", {"codes": [99999]}], "a"), r"messages\[0\]\.content\[1\]\.codes: image codes are 0 to"),
    (talk(["see", {"codes": [1]}], "a"), r"content\[1\]\.codes: an image has \d+ codes, not 1\.")])
def test_decode_broken_records(words, fields, sentence):
    with pytest.raises(BadRecord, match=sentence):
        made(words, fields)
