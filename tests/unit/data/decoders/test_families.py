"""Sequences that no recording shows: `chat`, SEED-X's and LaVIT's; which tokens are learned."""

import pytest
from data_files import learned
from PIL import Image

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.language.prompts import get_template

# Of 1x1 and 2x1 tiles.
SQUARE, WIDE = (Image.new("RGB", size) for size in ((448, 448), (900, 450)))
SMALL = Image.new("RGB", (20, 10))


@pytest.fixture
def decode(tokenizer_of):
    """`decode(name, fields, longest, seed, **options)`."""

    def decode_it(name, fields, longest: int | None = None, seed=0, **options):
        decoder = get_decoder(name, tokenizer_of(name), options)
        return decoder.decode(fields, SeededRandom(seed), longest)

    return decode_it


def messages(*turns) -> dict:
    """A record of turns, starting with the user's."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[n % 2], "content": turn if isinstance(turn, list) else [turn]}
            for n, turn in enumerate(turns)
        ]
    }


# ---- chat


@pytest.mark.parametrize("template", ["vicuna", "llama2", "plain"])
def test_chat_encodes_the_prompt_as_at_inference(decode, tokenizer, codes, template):
    image = codes(1)
    turns = [
        ("user", [image, "  what is it? "]),
        ("assistant", ["a cat"]),
        ("user", ["draw a dog"]),
    ]
    prompt = tokenizer.encode_parts(get_template(template).render(turns), add_bos=True)
    answer = [*tokenizer.encode_parts(["here", image]), tokenizer.eos_token_id]
    fields = messages(
        [{"codes": image}, "  what is it? "], "a cat", "draw a dog", ["here ", {"codes": image}]
    )
    sequence = decode("chat", fields, template=template)
    assert sequence.ids == [*prompt, *answer]
    assert sequence.ids.count(tokenizer.eos_token_id) == 1
    # The next turn follows an answer without `</s>`, which is learned nevertheless.
    end = [] if template == "plain" else [tokenizer.eos_token_id]
    assert learned(sequence) == [*tokenizer.encode("a cat"), *end, *answer]


# ---- SEED-X


@pytest.fixture
def prompts(tokenizer_of):
    from seed_multimodal.models.seed_x.processing import SeedXPrompts

    return SeedXPrompts(tokenizer_of("seed_x"))


def test_seed_x_puts_images_at_their_placeholders(decode, prompts, tokenizer_of):
    # Else a question about an image is learned with the image elsewhere.
    tokenizer = tokenizer_of("seed_x")
    data = ["This <image>is what?", "A cat."]
    first = decode("seed_x.conversation", {"image": SQUARE, "data": data})
    end = first.input_positions[-1] + 2
    expected = prompts.dialogue([("user", ["This ", prompts.image(2), "is what?"])])
    assert first.ids[:end] == expected[:end]

    data = ["Say red.", "Red.", "<image>And this?", "A cat."]
    later = decode("seed_x.conversation", {"image": SQUARE, "data": data})
    question = ("user", [prompts.image(2), "And this?"])
    turns = [("user", ["Say red."]), ("assistant", ["Red."]), question]
    prompt = prompts.dialogue(turns)
    assert later.ids[: len(prompt)] == prompt
    system = tokenizer.encode("Be brief.\n")
    assert prompts.dialogue(turns, system="Be brief.") == [prompt[0], *system, *prompt[1:]]

    edit = {"source_image": SQUARE, "target_image": SQUARE, "instruction": "Make <image> red"}
    edited = decode("seed_x.edit", edit)
    assert tokenizer.decode(edited.ids[1:]).startswith("[INST] Make <patch>")
    # A placeholder is never encoded as text.
    for sequence in (first, later, edited):
        assert "image>" not in tokenizer.decode(sequence.ids)


def test_seed_x_chat_of_several_edits(decode, prompts, tokenizer_of):
    first, second = ["here.", {"image": SQUARE}], ["here.", {"image": WIDE}]
    turns = [[{"image": WIDE}, "red"], first, "blue", second, "What?", "a cat.", "And?", "no."]
    sequence = decode("seed_x.chat", messages(*turns))
    # Generated images are read in later turns, too.
    assert [(image.image, image.is_target) for image in sequence.images] == [
        (WIDE, False),
        (SQUARE, True),
        (SQUARE, False),
        (WIDE, True),
        (WIDE, False),
    ]
    text = tokenizer_of("seed_x").decode(learned(sequence))
    assert " ".join(text.split()) == "here. <img> here. <img> a cat. no.</s>"
    # Features of each view are read; of a target only the whole image is learned.
    assert (len(sequence.input_positions), len(sequence.target_positions)) == (32, 8)
    # The prompt as at inference.
    prompt_ids = prompts.dialogue([("user", [prompts.image(3), "red"])])
    assert sequence.ids[: len(prompt_ids)] == prompt_ids

    # A system message of the conversation, too.
    told = decode("seed_x.chat", {**messages("red", "Red."), "system": "Be brief."})
    prompt_ids = prompts.dialogue([("user", ["red"])], system="Be brief.")
    assert told.ids[: len(prompt_ids)] == prompt_ids

    # Of an answer that is context neither the text nor the image is learned.
    record = messages(*turns)
    record["messages"][1]["learned"] = False
    masked = decode("seed_x.chat", record)
    assert masked.ids == sequence.ids
    assert [image.is_target for image in masked.images] == [False, False, True, False]
    text = tokenizer_of("seed_x").decode(learned(masked))
    assert " ".join(text.split()) == "here. <img> a cat. no.</s>"


# ---- LaVIT


def test_lavit_caption_in_both_directions(decode, tokenizer_of):
    # The caption is learned behind its image, the image behind its caption.
    tokenizer = tokenizer_of("lavit")
    vocabulary = tokenizer.vocabulary
    # An image of 16 patches has 6 placeholders (three eighths).
    inner = [*[vocabulary.boi_id + 2] * 6, vocabulary.eoi_id]
    image = [vocabulary.boi_id, *inner]
    text = tokenizer.text_ids("a red cat")
    eos = tokenizer.eos_token_id

    fields = {"image": SMALL, "text": [" a red cat "]}
    read = decode("lavit.caption", fields, img_first_ratio=1.0)
    assert read.ids == [*image, *text, eos]
    assert learned(read) == [*text, eos]
    assert (read.input_positions, read.target_positions) == (list(range(1, 7)), [])

    generated = decode("lavit.caption", fields, img_first_ratio=0.0, text_dropout=0.0)
    assert generated.ids == [*text, *image]
    assert learned(generated) == inner
    positions = list(range(len(text) + 1, len(text) + 7))
    assert (generated.input_positions, generated.target_positions) == ([], positions)
    assert generated.images[0].is_target

    # Without the caption: the image alone, for guidance.
    alone = decode("lavit.caption", fields, img_first_ratio=0.0, text_dropout=1.0)
    assert (alone.ids, learned(alone)) == (image, inner)
    seeds = [decode("lavit.caption", fields, seed=seed).images[0].seed for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_lavit_question_and_compose(decode, tokenizer_of):
    tokenizer = tokenizer_of("lavit")
    vocabulary = tokenizer.vocabulary
    inner = [*[vocabulary.boi_id + 2] * 6, vocabulary.eoi_id]
    question = tokenizer.text_ids("Question: What is it? Answer:")
    answer = [*tokenizer.text_ids("a dog"), tokenizer.eos_token_id]
    fields = {"image": SMALL, "question": "What is it?", "answer": "a dog"}
    sequence = decode("lavit.question", fields)
    assert sequence.ids == [vocabulary.boi_id, *inner, *question, *answer]
    assert learned(sequence) == answer

    # The source as codes, or opened.
    instruction = tokenizer.text_ids("make it blue")
    fields = {"source_image_ids": [1, 2], "target_image": SMALL, "instruction": "make it blue"}
    coded = decode("lavit.compose", fields, text_dropout=0.0)
    source = [vocabulary.boi_id + 3, vocabulary.boi_id + 4]
    assert coded.ids == [*source, *instruction, vocabulary.boi_id, *inner]
    assert learned(coded) == inner
    assert len(coded.images) == 1
    fields |= {"source_image_ids": None, "source_image": SMALL}
    opened = decode("lavit.compose", fields, text_dropout=0.0)
    assert (learned(opened), len(opened.images)) == (inner, 2)
