"""The original decoders at nano's sizes: options, bad records, randomness.

Ids and labels: golden fixtures.
"""

from __future__ import annotations

from typing import Any

import pytest

from seed_multimodal.data.decoders import DECODERS, get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX


@pytest.fixture(scope="module")
def records(tokenizer: MultimodalTokenizer) -> dict[str, dict[str, Any]]:
    """A good record of every decoder."""
    size = tokenizer.vocabulary.tokens_per_image
    image_a, image_b, image_c = ([start + n for n in range(size)] for start in (0, 7, 20))
    pair = {"image_ids": image_a, "question": "What?", "answer": "red"}
    edit = {"source_image_ids": image_a, "target_image_ids": image_b, "instruction": "snow"}
    dialogue = {"question": "Question: a? Question: b?", "answer": "Answer: c Answer: d"}
    turns = ["hello", "hi", "what?", "that."]
    code_names = "".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(image_a)))
    return {
        "pretrain.caption": {"image_ids": image_a, "text": "a cat"},
        "pretrain.interleaved": {
            "image_ids": [image_a, None, image_b],
            "texts": [None, "then", None],
            "metadata": {},
        },
        "pretrain.video": {"image_ids": image_a + image_b + image_c + image_a, "answer": "it runs"},
        "pretrain.text": {"text": "some words"},
        "pretrain.edit": edit,
        "pretrain.visual_question": {"image_ids": [image_a], "data": turns},
        "sft.visual_question": {
            "image_ids": [image_a, image_b],
            "instruction": "say",
            "outputs": "a cat",
        },
        "pretrain.text_conversation": {"data": turns},
        "sft.text_conversation": {"data": turns},
        "sft.qa": pair,
        "sft.edit": edit,
        "sft.video": {**pair, "image_ids": image_a + image_b},
        "sft.difference": {**pair, "image_ids": image_a + image_b},
        "sft.story": {
            "image_ids": image_a + image_b + image_c,
            "caption0": "x",
            "caption1": "y",
            "caption2": "z",
        },
        "sft.multi_edit": {"image_ids": image_a + image_b, "instruction0": "snow"},
        "sft.conversation": {"image_ids": image_a, **dialogue},
        "sft.video_conversation": {"image_ids": image_a + image_b, **dialogue},
        "sft.interleaved": {
            "instruction": f"look {code_names} now",
            "response": f"{code_names} done",
        },
        "chat": {
            "messages": [
                {"role": "user", "content": [{"codes": image_a}, "q"]},
                {"role": "assistant", "content": "a"},
            ]
        },
    }


@pytest.mark.parametrize("name", DECODERS)
def test_decode_good_record(tokenizer, records, name):
    decoder = get_decoder(name, tokenizer)
    sequence = decoder.decode(records[name], SeededRandom(3, 1))
    assert (
        not sequence.drop_reason
        and sequence.ids[0] == tokenizer.bos_token_id
        and len(sequence.ids) == len(sequence.labels)
    )
    assert all(
        label in (IGNORE_INDEX, id) for label, id in zip(sequence.labels, sequence.ids, strict=True)
    )
    assert sequence.labels[-1] == sequence.ids[-1] == tokenizer.eos_token_id
    assert (
        decoder.decode(records[name], SeededRandom(3, 1)) == sequence
    )  # all randomness is of the rng
    cut = decoder.decode(records[name], SeededRandom(3, 1), 9)
    assert (cut.ids, cut.labels) == (sequence.ids[:9], sequence.labels[:9])


@pytest.mark.parametrize("name", DECODERS)
def test_decode_missing_field(tokenizer, records, name):
    for key in set(records[name]) - ({"metadata"} if name == "pretrain.interleaved" else set()):
        fields = {other: value for other, value in records[name].items() if other != key}
        if key == "caption2":  # a shorter story, but with an image too many
            key = "image_ids"
        key = "data" if key == "outputs" else key  # or
        with pytest.raises(BadRecord, match=key):
            get_decoder(name, tokenizer).decode(fields, SeededRandom(0))


def test_get_decoder_wrong_name_or_option(tokenizer):
    with pytest.raises(
        ConfigError, match=r"decoder 'pretrain\.captions' \(did you mean 'pretrain\.caption'\?\)"
    ):
        get_decoder("pretrain.captions", tokenizer)
    with pytest.raises(
        ConfigError, match=r"decoder sft\.qa: unknown key 'templat' \(did you mean 'template'\?\)"
    ):
        get_decoder("sft.qa", tokenizer, {"templat": "vicuna"})
    with pytest.raises(ConfigError, match="reverse_ratio"):
        get_decoder("sft.difference", tokenizer, {"reverse_ratio": 0.5})


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pretrain.caption", {"text": " .; "}, "the text is blank"),
        (
            "pretrain.interleaved",
            {"texts": ["both", "then", None]},
            "not either an image or a text",
        ),
        ("sft.conversation", {"question": "Image Descriptions Question: a?"}, "no dialogue in it"),
        ("sft.text_conversation", {"data": ["q"]}, "nothing to learn"),
        ("sft.interleaved", {"response": ""}, "nothing to learn"),
    ],
)
def test_decode_dropped_records(tokenizer, records, name, change, reason):
    assert (
        reason
        in get_decoder(name, tokenizer).decode(records[name] | change, SeededRandom(0)).drop_reason
    )


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("sft.story", {"caption3": "more"}, "3 images, but the texts have 4"),
        ("sft.multi_edit", {"instruction1": "rain"}, "2 images, but the texts have 3"),
        ("sft.video_conversation", {"answer": "Answer: c"}, "1 answers to 2 questions"),
        ("sft.qa", {"image_ids": [9]}, "image_ids: an image has .* codes, not 1"),
        ("sft.edit", {"target_image_ids": [-1] * 16}, "target_image_ids: image codes are 0 to"),
        (
            "pretrain.interleaved",
            {"image_ids": [[9], None], "texts": [None, "a"]},
            r"image_ids\[0\]: an image has",
        ),
        ("sft.qa", {"answer": " "}, "answer: is empty"),
        ("pretrain.video", {"image_ids": []}, "fewer than num_frames"),
    ],
)
def test_decode_broken_records(tokenizer, records, name, change, sentence):
    with pytest.raises(BadRecord, match=sentence):
        get_decoder(name, tokenizer).decode(records[name] | change, SeededRandom(0))


def test_decode_views_and_several_captions(tokenizer, records):
    codes = records["pretrain.caption"]["image_ids"]
    fields = {"views": [codes, codes[::-1]], "text": ["a cat", "a small cat"]}
    decoder = get_decoder("pretrain.caption", tokenizer, {"reverse_ratio": 1.0})
    sequences = {tuple(decoder.decode(fields, SeededRandom(seed)).ids) for seed in range(40)}
    assert sequences == {
        tuple(decoder.decode({"image_ids": view, "text": text}, SeededRandom(0)).ids)
        for view in fields["views"]
        for text in fields["text"]
    }
    first = get_decoder("pretrain.caption", tokenizer, {"first_text": 1.0})
    assert {first.decode(fields, SeededRandom(seed)).extra["text"] for seed in range(20)} == {
        "a cat"
    }


def test_seeded_random_depends_on_its_numbers():
    def several(*indices: int) -> tuple[Any, ...]:
        rng = SeededRandom(*indices)
        order = list(range(8))
        rng.shuffle(order)
        return rng.uniform(), rng.randint(0, 1000), rng.choice("abcdefgh"), order

    assert (
        len(
            {
                str(several(*indices))
                for indices in [(1,), (1, 2), (12,), (1, 2, 3), (1, 23), (0, 1), (-1,)]
            }
        )
        == 7
    )
    # A resumed run must have the values of the first one, also after an update of Python.
    assert several(5, 6) == (0.6832392450925442, 612, "e", [4, 1, 2, 5, 3, 0, 6, 7])


TUNED = [name for name in DECODERS if name.startswith("sft.") or name == "chat"]


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
@pytest.mark.parametrize("name", TUNED)
def test_decode_with_template(tokenizer, records, name, template):
    """The template changes prompts only, not the labels."""
    plain = get_decoder(name, tokenizer, {}).decode(records[name], SeededRandom(3, 1))
    sequence = get_decoder(name, tokenizer, {"template": template}).decode(
        records[name], SeededRandom(3, 1)
    )
    learned, expected = (
        [label for label in item.labels if label != IGNORE_INDEX] for item in (sequence, plain)
    )
    assert learned == expected and (template != "vicuna" or sequence == plain)


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
def test_decode_encodes_the_prompt_as_at_inference(tokenizer, codes, template):
    record = {"image_ids": codes(1), "question": "What is it?", "answer": "a cat"}
    sequence = get_decoder("sft.qa", tokenizer, {"template": template}).decode(
        record, SeededRandom(3, 1)
    )
    prompt = tokenizer.encode_parts(
        get_template(template).render([("user", [codes(1), "What is it?"])]), add_bos=True
    )
    assert sequence.ids[: len(prompt)] == prompt and sequence.labels[: len(prompt)] == [
        IGNORE_INDEX
    ] * len(prompt)
    assert sequence.labels[len(prompt)] != IGNORE_INDEX
