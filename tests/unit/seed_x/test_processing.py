"""SEED-X's tokens, prompts and boxes (those of the original scripts: golden kind
`seedx_inference`).
"""

from __future__ import annotations

import pytest
import torch
from repository import ROOT

from seed_multimodal.errors import CheckpointError, RequestError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.models.seed_x.pipeline import SeedX
from seed_multimodal.models.seed_x.processing import (
    Box,
    InputImage,
    SeedXPrompts,
    insert_images,
    read_boxes,
    without_tags,
)
from seed_multimodal.pipelines.config import SystemConfig


def test_vocabulary_has_the_original_ids():
    vocabulary = SeedXVocabulary()
    ids = vocabulary.added_tokens
    assert vocabulary.size == 32330 and len(ids) == 330
    assert [
        ids[w]
        for w in (
            "<img_00000>",
            "<img_00099>",
            "<img>",
            "</img>",
            "<patch>",
            "</patch>",
            "<loc-0>",
            "<loc-223>",
            "<box_start>",
            "<box_end>",
        )
    ] == [32000, 32099, 32100, 32101, 32102, 32103, 32104, 32327, 32328, 32329]
    assert [len(vocabulary.read_ids(views)) for views in (2, 3, 4, 5)] == [132, 198, 264, 330]
    assert (
        vocabulary.image_length == 66
        and not vocabulary.is_code_id(32100)
        and vocabulary.is_image_token(32103)
    )
    assert list(Box(114, 174, 115, 56).ids(vocabulary)) == [
        32328,
        32218,
        32278,
        32219,
        32160,
        32329,
    ]
    assert Box(114, 174, 115, 56).corners((1200, 1200)) == (
        302,
        782,
        918,
        1082,
    )  # the authors' own image


def test_dialogue_and_alone(seedx_tokenizer: MultimodalTokenizer):
    t = seedx_tokenizer
    prompts = SeedXPrompts(t)
    vocabulary = prompts.vocabulary
    image = list(vocabulary.read_ids(2))
    after = t.encode("What? [/INST]\n")

    def ask(text: str, views: list[int]) -> list[int]:
        return prompts.dialogue([("user", insert_images(text, views))])

    assert (
        ask("What?", [2]) == [1, *t.encode("[INST]"), *image, *after] == ask("<image> What?", [2])
    )
    assert ask("A <image> B<image>C", [1, 2]) == [
        1,
        *t.encode("[INST] A"),
        *vocabulary.read_ids(1),
        *t.encode("B"),
        *image,
        *t.encode("C [/INST]\n"),
    ]
    question = prompts.completion(insert_images("What?", [1]))
    assert question == [
        1,
        *t.encode("Question:"),
        *vocabulary.read_ids(1),
        *t.encode("What?\nAnswer:"),
    ]
    phrase = prompts.completion(insert_images("a cat", [1]), "detect")
    assert phrase == [1, *vocabulary.read_ids(1), *t.encode("a cat [["), vocabulary.boxes]
    assert prompts.completion(["a cat "], "draw") == [1, *t.encode("a cat")]
    # Every turn is encoded separately, as in training.
    turns = [("user", [InputImage(1), "What?"]), ("assistant", ["A cat."]), ("user", ["Where?"])]
    assert prompts.dialogue(turns, system="Be brief.") == [
        1,
        *t.encode("Be brief.\n"),
        *t.encode("[INST]"),
        *vocabulary.read_ids(1),
        *after,
        *t.encode("A cat."),
        *t.encode("\n[INST] Where? [/INST]\n"),
    ]
    assert (
        prompts.dialogue(turns[:1]) == prompts.dialogue(turns)[: len(prompts.dialogue(turns[:1]))]
    )


def test_place_images_with_a_wrong_number_of_images():
    assert insert_images("a", [1]) == [InputImage(1), "a"]
    for text, views in (("<image> and <image>", [1]), ("<image>", [1, 1]), ("<image>", [])):
        with pytest.raises(RequestError, match=r"placeholders for \d images"):
            insert_images(text, views)


@pytest.mark.parametrize(
    "text",
    [
        "<loc-1> <loc-2> <loc-3> <box_end>",
        "<loc-1> a <loc-2> <loc-3> <loc-4> <box_end>",
        "<loc-1> <loc-2> <loc-3> <loc-224> <box_end>",
        "<loc-1> <loc-2> <loc-3> <loc-4>",
    ],
)
def test_read_boxes_next_to_a_malformed_one(text):
    boxes, problems = read_boxes(
        f"<box_start> {text} it <box_start> <loc-1> <loc-2>\n<loc-3> <loc-4> <box_end>."
    )
    assert boxes == [Box(1, 2, 3, 4)] and len(problems) == 1
    assert problems[0].startswith(
        "A box is not four locations below 224 with a width, a height and <box_end>: "
    )


def test_read_boxes_after_an_opened_one():
    text = (
        "<loc-1><loc-2><loc-3><loc-4> <box_end> ]] and <box_start> <loc-5> <loc-6> <loc-7> "
        "<loc-8> <box_end>"
    )
    assert read_boxes(text, opened=True) == ([Box(1, 2, 3, 4), Box(5, 6, 7, 8)], [])
    assert read_boxes("a cat", opened=True)[1] and not read_boxes("a cat")[1]
    assert read_boxes("a <box_end>")[1] == ["<box_end> stands without <box_start>."]
    assert without_tags("A <b>cat</b> <loc-3>here.</s>") == "A cat here."


def test_box_around_and_corners():
    assert Box.from_corners((302, 782, 918, 1082), (1200, 1200)) == Box(114, 174, 115, 56)
    assert Box.from_corners((0, 0, 640, 480), (640, 480)) == Box(112, 112, 223, 223)
    assert Box(0, 223, 100, 100).corners((224, 224)) == (0, 173, 50, 224)  # clipped at the edges


def test_detect_with_the_original_weights():
    """`vis/car.png` of SEED-X's repository shows this box.

    The published answer is that of float16.
    """
    car = ROOT / "demo_images" / "car.jpg"
    try:
        SystemConfig.find("seed-x").require("llm", "agent", "tokenizer", "vision")
    except CheckpointError as error:
        pytest.skip(str(error))
    if not car.is_file() or not torch.cuda.is_available():
        pytest.skip(f"needs {car} of SEED-X's repository and a GPU")
    phrase = (
        "In ths background with a blue sky on the road, there is a car"  # as in the original script
    )
    detection = SeedX.from_pretrained("seed-x", load_decoder=False, log=None).detect(car, phrase)
    assert detection.grid == [Box(114, 174, 115, 56)] and detection.boxes == [(302, 782, 918, 1082)]
    assert not detection.problems
