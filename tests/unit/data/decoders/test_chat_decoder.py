"""The decoder `chat`: prompt templates, what is learned, placeholders, several captions."""

from __future__ import annotations

from typing import Any

import pytest

from seed_multimodal.data.decoders.registry import get_decoder
from seed_multimodal.data.decoders.sequence import IGNORED, SeededDraws, TokenSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

DRAWS = SeededDraws(0)


@pytest.fixture(scope="module")
def picture(words: MultimodalTokenizer) -> list[int]:
    return list(range(words.vocabulary.tokens_per_image))


def talk(*turns: Any) -> dict[str, Any]:
    """A record of turns, the user's first."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


def made(words: MultimodalTokenizer, fields: dict[str, Any], **options: Any) -> TokenSequence:
    sequence = get_decoder("chat", words, options)(fields, DRAWS)
    assert sequence is not None and len(sequence.ids) == len(sequence.labels)
    return sequence


def learned(sequence: TokenSequence) -> list[int]:
    assert all(label in (IGNORED, id) for label, id in zip(sequence.labels, sequence.ids, strict=True))
    return [label for label in sequence.labels if label != IGNORED]


# ---- ids and labels


@pytest.mark.parametrize("template", ["vicuna", "llama2", "plain"])
def test_ids_are_those_of_the_prompt_at_inference(words, picture, template) -> None:
    turns = [("user", [picture, "  what is it? "]), ("assistant", ["a cat"]), ("user", ["draw a dog"])]
    prompt = words.encode_parts(get_template(template).render(turns), add_bos=True)
    answer = words.encode_parts(["here", picture])
    fields = {"messages": [*({"role": role, "content": [part if isinstance(part, str) else {"codes": part}
                                                        for part in content]} for role, content in turns),
                           {"role": "assistant", "content": ["here ", {"codes": picture}]}]}
    last = made(words, fields, template=template, answers="last")
    assert last.ids == [*prompt, *answer, words.eos_id]
    assert learned(last) == [*answer, words.eos_id] and last.labels[:len(prompt)] == [IGNORED] * len(prompt)
    every = made(words, fields, template=template)
    end = words.encode_parts([get_template(template).turn_marker], strip=False)  # where a system stops
    assert every.ids == last.ids and learned(every) == [*words.encode("a cat"), *end, *answer, words.eos_id]
    assert bool(end) == (template != "plain")
    assert every.ids.count(words.eos_id) == 1


def test_an_answer_that_is_a_picture_is_followed_by_nothing_learned(words, picture) -> None:
    fields = talk("draw", [{"codes": picture}], "what is it?", "a cat")
    shown = words.encode_parts([picture])
    assert learned(made(words, fields)) == [*shown, *words.encode("a cat"), words.eos_id]


def test_newline_before_an_answer_that_is_a_picture_stays(words, picture) -> None:
    fields = talk("draw", [{"codes": picture}])
    prompt = words.encode_parts(get_template("llama2").render([("user", "draw")]), add_bos=True)
    assert words.decode(prompt).endswith("\n")
    assert made(words, fields, template="llama2").ids[:len(prompt)] == prompt


def test_control_words_in_texts_are_letters(words) -> None:
    sequence = made(words, talk("say </s> and <img>", "<unk></s>"))
    assert sequence.ids.count(words.eos_id) == 1 and words.vocabulary.boi_id not in sequence.ids
    assert words.unk_id not in sequence.ids


def test_one_drawn_answer_ends_the_dialogue(words) -> None:
    fields = talk("q1", "first", "q2", "second", "q3", "third")
    found = set()
    for seed in range(30):
        sequence = get_decoder("chat", words, {"answers": "one"})(fields, SeededDraws(seed))
        assert sequence is not None
        text = words.decode(learned(sequence)).removesuffix("</s>").strip()
        assert words.decode(sequence.ids).removesuffix("</s>").strip().endswith(text)
        found.add(text)
    assert found == {"first", "second", "third"}


def test_system_message_of_record_and_option(words) -> None:
    plain, fields = made(words, talk("q", "a")), {**talk("q", "a"), "system": "Be brief."}
    own, given = made(words, fields), made(words, talk("q", "a"), system_message="Be brief.")
    assert own == given and own.ids != plain.ids and learned(own) == learned(plain)
    assert words.decode(own.ids).replace(" ", "").startswith("<s>Bebrief.\nUSER:q")


def test_max_length_cuts_and_none_does_not(words, picture) -> None:
    fields = talk([{"codes": picture}, "q"], "a")
    whole = made(words, fields)
    short = get_decoder("chat", words, {})(fields, DRAWS, 7)
    assert short is not None and short.ids == whole.ids[:7] and short.labels == whole.labels[:7]


# ---- pictures


def test_placeholders_take_the_pictures_in_order(words, picture) -> None:
    other = picture[::-1]
    inside = talk([{"codes": picture}, "and", {"codes": other}, "differ?"], "yes")
    beside = {**talk("<image>\nand <image> differ?", "yes"), "image_ids": [picture, other]}
    assert made(words, beside) == made(words, inside)
    assert made(words, {**beside, "image_ids": picture + other}) == made(words, inside)
    assert made(words, {**inside, "image_ids": [picture, other]}) == made(words, inside)


@pytest.mark.parametrize("pictures, found", [([], 0), (1, 1), (3, 3)])
def test_another_number_of_pictures_than_placeholders(words, picture, pictures, found) -> None:
    fields = {**talk("<image><image> what?", "cats"), "image_ids": [picture] * pictures if pictures else []}
    with pytest.raises(BadRecord, match=rf"messages: 2 <image> placeholders for {found} pictures in image_ids\."):
        made(words, fields)


def test_pictures_without_a_place_are_refused(words, picture) -> None:
    with pytest.raises(BadRecord, match="0 <image> placeholders for 1 pictures"):
        made(words, {**talk("what?", "cats"), "image_ids": [picture]})


def test_a_view_is_drawn(words, picture) -> None:
    views = [picture, picture[::-1]]
    found = {tuple(get_decoder("chat", words, {})(talk([{"codes": views}, "q"], "a"), SeededDraws(seed)).ids)
             for seed in range(20)}
    assert found == {tuple(made(words, talk([{"codes": view}, "q"], "a")).ids) for view in views}


def test_noise_only_in_pictures_that_are_read(words, picture) -> None:
    size = words.vocabulary.tokens_per_image
    other = [words.vocabulary.n_codes - 1] * size
    fields = talk([{"codes": picture}, "draw it again"], [{"codes": picture}], "and?", "yes")
    options = {"code_noise": 1.0, "noise_source": lambda draws: other}
    ids = words.vocabulary.image_ids(picture)
    levels = []
    for seed in range(40):
        sequence = get_decoder("chat", words, options)(fields, SeededDraws(seed))
        assert learned(sequence)[:len(ids)] == ids
        start = sequence.ids.index(words.vocabulary.boi_id) + 1
        read = words.vocabulary.id_to_code(sequence.ids[start:start + size])
        assert all(code in (mine, other[0]) for code, mine in zip(read, picture, strict=True))
        levels.append(sum(code == other[0] for code in read) / size)
    assert 0.3 < sum(levels) / len(levels) < 0.7 and max(levels) > 0.75 and min(levels) < 0.25


# ---- refusals, each naming the field


@pytest.mark.parametrize("fields, sentence", [
    ({}, r"messages: is missing; decoder chat needs it\."),
    ({"messages": "hello"}, r"messages: must be a list, not 'hello'\."),
    (talk("q"), r"messages: the conversation ends without an answer\."),
    ({"messages": []}, r"messages: the conversation ends without an answer\."),
    (talk("q", "  "), r"messages\[1\]\.content: is empty\."),
    (talk("q", 3), r"messages\[1\]\.content: must be a text or a list, not 3\."),
    (talk([{"image": "cat.png"}, "q"], "a"), r"messages\[0\]\.content\[0\]: the picture 'cat\.png' has no codes yet"),
    (talk([None, "q"], "a"), r"messages\[0\]\.content\[0\]: must be a text or a picture with codes, not None\."),
    ({"messages": [{"role": "bot", "content": "a"}]}, r"messages\[0\]: the role 'bot' is not user or assistant\."),
    ({"messages": [{"role": "assistant", "content": "a"}]}, r"messages\[0\]: is the assistant's turn, but the user's"),
    ({"messages": [{"from": "human"}]}, r"messages\[0\]: must be an object with role and content\."),
    ({**talk("q", "a"), "system": 7}, r"system: must be a text, not 7\."),
])
def test_broken_records_name_the_field(words, fields, sentence) -> None:
    with pytest.raises(BadRecord, match=sentence):
        made(words, fields)


def test_wrong_codes_name_the_field(words, picture) -> None:
    size, most = len(picture), words.vocabulary.n_codes
    with pytest.raises(BadRecord, match=rf"messages\[0\]\.content\[1\]\.codes: code {most} at place 0 is outside 0"):
        made(words, talk(["see", {"codes": [most, *picture[1:]]}], "a"))
    with pytest.raises(BadRecord, match=rf"\.codes: a picture has {size} codes, not {size - 1}\."):
        made(words, talk([{"codes": picture[1:]}], "a"))
    with pytest.raises(BadRecord, match=r"\.codes: must be a list of image codes, not \['x'\]"):
        made(words, talk([{"codes": ["x"]}], "a"))


def test_unknown_options(words) -> None:
    with pytest.raises(ConfigError, match=r"decoder chat: unknown key 'tempalte' \(did you mean 'template'\?\)"):
        get_decoder("chat", words, {"tempalte": "vicuna"})
    with pytest.raises(ConfigError, match=r"template must be one of vicuna, llama2, plain, not 'alpaca'"):
        get_decoder("chat", words, {"template": "alpaca"})
    with pytest.raises(ConfigError, match=r"answers must be one of every, last, one"):
        get_decoder("chat", words, {"answers": "first"})


def test_caption_of_a_record_with_several(words: MultimodalTokenizer) -> None:
    """`first_text`: the canonical caption with that chance, else any one of them."""
    captions = ["a red apple", "an apple", "fruit"]
    fields = {"image_ids": list(range(0, 1024, 32)), "text": captions}

    def said(first_text: float) -> list[str]:
        decoder = get_decoder("pretrain.caption", words, {"reverse_ratio": 0.0, "first_text": first_text})
        found = [decoder(fields, SeededDraws(0, number)) for number in range(90)]
        return [sequence.extra["text"] for sequence in found if sequence is not None]

    assert set(said(1.0)) == {captions[0]}
    assert all(20 <= said(0.0).count(caption) <= 40 for caption in captions)
    assert 50 <= said(0.5).count(captions[0]) <= 70
