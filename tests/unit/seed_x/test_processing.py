"""SEED-X's tokens, prompts and boxes (those of the original scripts: golden kind
`seedx_inference`).
"""

from __future__ import annotations

import pytest

from seed_multimodal.errors import RequestError
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.models.seed_x.processing import (
    Box,
    InputImage,
    SeedXPrompts,
    insert_images,
    read_boxes,
    without_tags,
)


def test_vocabulary_has_the_original_ids():
    # Ids are those of the published embeddings: one off, and all boxes are wrong.
    vocabulary = SeedXVocabulary()
    ids = vocabulary.added_tokens
    assert vocabulary.size == 32330
    assert len(ids) == 330
    tokens = "<img_00000> <img_00099> <img> </img> <patch> </patch> <loc-0> <loc-223>".split()
    expected = [32000, 32099, 32100, 32101, 32102, 32103, 32104, 32327]
    assert [ids[token] for token in tokens] == expected
    assert (ids["<box_start>"], ids["<box_end>"]) == (32328, 32329)
    assert [len(vocabulary.read_ids(views)) for views in (2, 3, 4, 5)] == [132, 198, 264, 330]
    assert vocabulary.image_length == 66
    assert not vocabulary.is_code_id(32100)
    assert vocabulary.is_image_token(32103)

    # The car of the authors' own image.
    car = Box(114, 174, 115, 56)
    assert list(car.ids(vocabulary)) == [32328, 32218, 32278, 32219, 32160, 32329]
    assert car.corners((1200, 1200)) == (302, 782, 918, 1082)


def test_dialogue_and_completion(seedx_tokenizer):
    encode = seedx_tokenizer.encode
    prompts = SeedXPrompts(seedx_tokenizer)
    vocabulary = prompts.vocabulary
    first = vocabulary.read_ids(1)
    second = vocabulary.read_ids(2)
    after = encode("What? [/INST]\n")

    # Images stand at their placeholders, without one in front.
    ask = [1, *encode("[INST]"), *second, *after]
    for text in ("What?", "<image> What?"):
        assert prompts.dialogue([("user", insert_images(text, [2]))]) == ask
    content = insert_images("A <image> B<image>C", [1, 2])
    parts = [*encode("[INST] A"), *first, *encode("B"), *second, *encode("C [/INST]\n")]
    assert prompts.dialogue([("user", content)]) == [1, *parts]

    question = prompts.completion(insert_images("What?", [1]))
    assert question == [1, *encode("Question:"), *first, *encode("What?\nAnswer:")]
    phrase = prompts.completion(insert_images("a cat", [1]), "detect")
    assert phrase == [1, *first, *encode("a cat [["), vocabulary.boxes]
    assert prompts.completion(["a cat "], "draw") == [1, *encode("a cat")]

    # Every turn is encoded separately, as in training.
    turns = [("user", [InputImage(1), "What?"]), ("assistant", ["A cat."]), ("user", ["Where?"])]
    opening = [*encode("[INST]"), *first, *after]
    rest = [*encode("A cat."), *encode("\n[INST] Where? [/INST]\n")]
    assert prompts.dialogue(turns) == [1, *opening, *rest]
    system = prompts.dialogue(turns, system="Be brief.")
    assert system == [1, *encode("Be brief.\n"), *opening, *rest]


@pytest.mark.parametrize(
    ("text", "views"), [("<image> and <image>", [1]), ("<image>", [1, 1]), ("<image>", [])]
)
def test_insert_images_with_a_wrong_number_of_images(text, views):
    # An image at the wrong place is a wrong answer, so it is an error.
    with pytest.raises(RequestError, match=f"{len(views)} images"):
        insert_images(text, views)


@pytest.mark.parametrize(
    "text",
    [
        "<loc-1> <loc-2> <loc-3> <box_end>",
        "<loc-1> a <loc-2> <loc-3> <loc-4> <box_end>",
        "<loc-1> <loc-2> <loc-3> <loc-224> <box_end>",
        "<loc-1> <loc-2> <loc-3> <loc-4>",
    ],
    ids=["three", "a word", "too large", "no end"],
)
def test_read_boxes_next_to_a_malformed_one(text):
    # A half-written box is a note, the others are drawn.
    good = "<box_start> <loc-1> <loc-2>\n<loc-3> <loc-4> <box_end>"
    boxes, problems = read_boxes(f"<box_start> {text} it {good}.")
    assert boxes == [Box(1, 2, 3, 4)]
    assert len(problems) == 1


def test_read_boxes_after_an_opened_one():
    first = "<loc-1><loc-2><loc-3><loc-4> <box_end>"
    second = "<box_start> <loc-5> <loc-6> <loc-7> <loc-8> <box_end>"
    boxes = [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]
    assert read_boxes(f"{first} ]] and {second}", opened=True) == (boxes, [])
    assert read_boxes("a cat", opened=True)[1]
    assert not read_boxes("a cat")[1]
    assert len(read_boxes("a <box_end>")[1]) == 1
    assert without_tags("A <b>cat</b> <loc-3>here.</s>") == "A cat here."


def test_box_from_corners_and_back():
    # In units of 224 from centre and size to pixels.
    assert Box.from_corners((302, 782, 918, 1082), (1200, 1200)) == Box(114, 174, 115, 56)
    assert Box.from_corners((0, 0, 640, 480), (640, 480)) == Box(112, 112, 223, 223)
    assert Box(0, 223, 100, 100).corners((224, 224)) == (0, 173, 50, 224)  # clipped at the edges
