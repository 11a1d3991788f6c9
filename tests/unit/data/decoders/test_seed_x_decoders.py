"""SEED-X's decoders: input and target images, labels, over-long and bad records.

Ids: golden fixtures.
"""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.decoders.features import ImageSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.seed_x.data import SeedXDecoder
from seed_multimodal.models.seed_x.processing import InputImage, SeedXPrompts, insert_images
from seed_nano.train.words import train_text_tokenizer

TEXTS = [
    "[INST] What is this? [/INST]\n",
    "It is a red cat.",
    "Here is a picture. Generate an image: blue",
] * 20
SQUARE, WIDE, SMALL = (
    Image.new("RGB", size) for size in ((448, 448), (900, 450), (300, 300))
)  # 1x1, 2x1, 1x1
TALK = {"image": SQUARE, "data": ["What?", "No."]}
EDIT = {"source_image": SQUARE, "target_image": SQUARE, "instruction": "red"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    return train_text_tokenizer(
        MultimodalTokenizer,
        TEXTS,
        tmp_path_factory.mktemp("words"),
        vocab_size=300,
        n_codes=6,
        tokens_per_image=4,
        n_locations=16,
    )


def make(tokenizer: MultimodalTokenizer, name: str, **options: Any) -> SeedXDecoder:
    decoder = get_decoder(f"seed_x.{name}", tokenizer, options)
    assert isinstance(decoder, SeedXDecoder)
    return decoder


def learned(sequence: ImageSequence, tokenizer: MultimodalTokenizer) -> str:
    return " ".join(
        tokenizer.decode([label for label in sequence.labels if label != IGNORE_INDEX]).split()
    )


def test_decode_edit_encodes_the_prompt_as_at_inference(tokenizer: MultimodalTokenizer):
    fields = {"source_image": WIDE, "target_image": SQUARE, "instruction": "make it red"}
    for seed in range(4):
        sequence = make(tokenizer, "edit").decode(fields, SeededRandom(seed))
        source, target = sequence.images
        assert (source.views, source.is_target, target.views, target.is_target) == (
            3,
            False,
            2,
            True,
        )
        assert len(sequence.input_positions) == 12 and len(sequence.target_positions) == 4
        assert learned(sequence, tokenizer).endswith("<img> </s>")
        prompt_ids = [
            SeedXPrompts(tokenizer).dialogue([("user", insert_images(text, [3]))])
            for text in ("make it red", "make it red<image>")
        ]
        assert sequence.ids[: len(prompt_ids[0])] in prompt_ids


def test_decode_puts_images_at_their_placeholders(tokenizer: MultimodalTokenizer):
    """As at inference; placeholders are never encoded as text."""
    prompts = SeedXPrompts(tokenizer)
    ask = make(tokenizer, "conversation")
    edit = make(tokenizer, "edit")
    first = ask.decode(
        {"image": SQUARE, "data": ["This <image>is what?", "A cat."]}, SeededRandom(0)
    )
    end = first.input_positions[-1] + 2
    assert (
        first.ids[:end] == prompts.dialogue([("user", ["This ", InputImage(2), "is what?"])])[:end]
    )
    later = ask.decode(
        {"image": SQUARE, "data": ["Say red.", "Red.", "<image>And this?", "A cat."]},
        SeededRandom(0),
    )
    assert (
        later.input_positions[0] > len(tokenizer.encode("[INST] Say red. [/INST]\n Red."))
        and len(later.images) == 1
    )
    changed = edit.decode({**EDIT, "instruction": "Make <image> red"}, SeededRandom(0))
    assert tokenizer.decode(changed.ids[1:]).startswith("[INST] Make <patch>")
    assert not any("image>" in tokenizer.decode(item.ids) for item in (first, later, changed))


def test_decode_drops_captions_too_long_to_generate_from(tokenizer: MultimodalTokenizer):
    decoder = make(tokenizer, "caption", img_first_ratio=-1.0, add_gen_prompt=True)
    good = decoder.decode({"image": SQUARE, "text": "a cat"}, SeededRandom(3), 90)
    assert learned(good, tokenizer) == "<img> </s>" and not good.input_positions
    long = decoder.decode({"image": SQUARE, "text": "a red cat " * 30}, SeededRandom(3), 90)
    assert "do not fit into 90 tokens" in long.drop_reason
    assert (
        decoder.decode({"image": SQUARE, "text": "a cat"}, SeededRandom(3), len(good)).ids
        == good.ids
    )
    assert decoder.decode(
        {"image": SQUARE, "text": "a cat"}, SeededRandom(3), len(good) - 1
    ).drop_reason


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"min_resolution": 400}, {"image": SMALL}, "resolution"),
        ({"min_aspect_ratio": 0.6}, {"image": WIDE}, "aspect"),
        ({"similarity_thr": 0.2}, {"metadata": '{"score": 0.05}'}, "similarity"),
        ({"similarity_thr": 0.2}, {}, ""),
    ],
)
def test_decode_filtered_pairs(tokenizer, options, change, reason):
    fields = {"image": SQUARE, "text": "a cat", **change}
    dropped = make(tokenizer, "caption", **options).decode(fields, SeededRandom(0)).drop_reason
    assert reason in dropped if reason else not dropped


def test_decode_never_cuts_images(tokenizer: MultimodalTokenizer):
    fields = {"image": SQUARE, "data": ["What? " * 9, "It is a cat. " * 9]}
    decoder = make(tokenizer, "conversation")
    uncut = decoder.decode(fields, SeededRandom(1))
    for longest in range(1, len(uncut) + 1):
        cut = decoder.decode(fields, SeededRandom(1), longest)
        learns = any(label != IGNORE_INDEX for label in uncut.labels[:longest])
        assert bool(cut.drop_reason) == (longest <= max(uncut.input_positions) + 1 or not learns)
        assert cut.drop_reason or cut.ids == uncut.ids[:longest] and len(cut.input_positions) == 8
    length = len(make(tokenizer, "edit").decode(EDIT, SeededRandom(1)))
    assert (
        make(tokenizer, "edit").decode(EDIT, SeededRandom(1), length).drop_reason
        == f"not fewer than {length} tokens"
    )


def test_decode_chat_of_several_edits(tokenizer: MultimodalTokenizer):
    turns = [
        [{"image": WIDE}, "red"],
        ["Here.", {"image": SQUARE}],
        ["blue"],
        ["Here.", {"image": WIDE}],
        ["What?"],
        ["A cat."],
        ["And?"],
        ["No."],
    ]
    messages = [{"content": turn} for turn in turns]
    sequence = make(tokenizer, "chat").decode({"messages": messages}, SeededRandom(0))
    assert [(image.image, image.is_target) for image in sequence.images] == [
        (WIDE, False),
        (SQUARE, True),
        (SQUARE, False),
        (WIDE, True),
        (WIDE, False),
    ]  # generated ones are read, too
    assert learned(sequence, tokenizer) == "Here. <img> Here. <img> A cat. No.</s>"
    turns = [("user", [InputImage(3), "red"])]
    prompt_ids = SeedXPrompts(tokenizer).dialogue(turns)
    assert sequence.ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("conversation", {"image": SQUARE}, "data: missing"),
        ("edit", {**EDIT, "target_image": None}, "target_image: missing"),
        ("edit", {**EDIT, "instruction": " "}, "instruction: is empty"),
        ("edit", {**EDIT, "source_image": "a.png"}, "source_image: must be a Image"),
        ("caption", {"image": SQUARE, "text": " . "}, "text: is empty"),
        ("caption", {"image": SQUARE, "text": "a", "metadata": "{"}, "metadata: is not JSON"),
        ("chat", {}, "messages: missing"),
    ],
)
def test_decode_broken_records(tokenizer: MultimodalTokenizer, name, fields, message):
    with pytest.raises(BadRecord, match=message):
        make(tokenizer, name).decode(fields, SeededRandom(0))
