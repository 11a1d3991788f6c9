"""SEED-X's words, prompts and boxes: the released numbers, and one sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seed_multimodal.errors import CheckpointError, ConfigError, RequestError
from seed_multimodal.language.tokenizer import ADDED, MultimodalTokenizer
from seed_multimodal.language.vocabulary import Ids, SeedXVocabulary
from seed_multimodal.seed_x.processing import (
    Box,
    ReadImage,
    SeedXPrompts,
    answer_text,
    box_numbers,
    place_images,
    read_boxes,
    without_words,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data" / "seedx_sequences" / "tokenizer"


def test_released_ids() -> None:
    words = SeedXVocabulary()
    ids = words.words
    assert words.size == 32330 and len(ids) == 330 and words == SeedXVocabulary.after(32000, 64)
    assert [ids[w] for w in ("<img_00000>", "<img_00099>", "<img>", "</img>", "<patch>", "</patch>", "<loc-0>",
                             "<loc-223>", "<box_start>", "<box_end>")] == [
        32000, 32099, 32100, 32101, 32102, 32103, 32104, 32327, 32328, 32329]
    assert list(ids.values()) == list(range(32000, 32330))
    assert [len(words.read_ids(views)) for views in (2, 3, 4, 5)] == [132, 198, 264, 330]
    assert words.image_length == 66 and not words.is_code_id(32100) and words.is_image_word(32103)
    assert list(Box(114, 174, 115, 56).ids(words)) == [32328, 32218, 32278, 32219, 32160, 32329]
    assert Box(114, 174, 115, 56).corners((1200, 1200)) == (302, 782, 918, 1082)  # the authors' own picture


def test_places_of_views(seedx_tokenizer: MultimodalTokenizer) -> None:
    words = seedx_tokenizer.vocabulary
    assert isinstance(words, SeedXVocabulary)
    ids = [1, 5, *words.read_ids(2), 7, *words.read_ids(1)]
    assert words.places(ids) == [3, 4, 5, 6, 9, 10, 11, 12, 16, 17, 18, 19]
    for wrong in (ids[:-1], ids[:-3], [1, words.boi_id, 5, words.eoi_id], [words.patches]):
        with pytest.raises(RequestError, match=r"at token \d+ of the prompt are not the 4 of a whole view\."):
            words.places(wrong)


def changed_words(folder: Path, **changes: object) -> Path:
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    words = json.loads((folder / ADDED).read_text())
    words.update({key: value for key, value in changes.items() if value is not None})
    for key in [key for key, value in changes.items() if value is None]:
        del words[key]
    (folder / ADDED).write_text(json.dumps(words))
    return folder


@pytest.mark.parametrize(("changes", "message"), [
    ({"<box_start>": None}, "cannot be read .*<box_start>"), ({"<img_00000>": "x"}, "image words cannot be read"),
    ({"<loc-5>": None}, "'<loc-2[0-9]+>' has id"), ({"<loc-5>": 480}, "'<loc-5>' has id 480"),
    ({"<box_start>": 480}, "'<box_end>' has id")])
def test_damaged_words_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        MultimodalTokenizer.from_pretrained(changed_words(tmp_path / "words", **changes))


def test_white_space_beside_every_word(seedx_tokenizer: MultimodalTokenizer) -> None:
    """The rules of transformers 4.30.2: blanks and line ends beside an added word go, each piece has its own blank."""
    t = seedx_tokenizer
    alone = t.encode("What")
    words = t.vocabulary
    assert isinstance(words, SeedXVocabulary)
    assert t.encode("<patch> \n What") == [words.patches, *alone]
    assert t.encode("What <loc-3>\nWhat") == [*alone, words.locations + 3, *alone]
    assert t.encode("What<loc-16>") == t.encode_parts(["What<loc-16>"])  # no word of this grid: letters
    assert t.encode_parts(["What ", Ids([words.boxes]), "\nWhat"]) == [*alone, words.boxes, *alone]
    assert t.encode_parts(["<loc-3>"]) != [words.locations + 3]  # typed by a user
    assert t.decode([words.boxes, words.locations, words.boxes + 1]) == "<box_start> <loc-0> <box_end>"


def test_prompts(seedx_tokenizer: MultimodalTokenizer) -> None:
    t = seedx_tokenizer
    tuned, base = SeedXPrompts(t), SeedXPrompts(t, tuned=False)
    words = tuned.vocabulary
    picture = list(words.read_ids(2))
    after = t.encode("What? [/INST]\n")

    def ask(text: str, views: list[int]) -> list[int]:
        return tuned.dialogue([("user", place_images(text, views))])

    assert ask("What?", [2]) == [1, *t.encode("[INST]"), *picture, *after] == ask("<image> What?", [2])
    assert ask("A <image> B<image>C", [1, 2]) == [
        1, *t.encode("[INST] A"), *words.read_ids(1), *t.encode("B"), *picture, *t.encode("C [/INST]\n")]
    asked = base.alone(place_images("What?", [1]))
    assert asked == [1, *t.encode("Question:"), *words.read_ids(1), *t.encode("What?\nAnswer:")]
    found = base.alone(place_images("a cat", [1]), "detect")
    assert found == [1, *words.read_ids(1), *t.encode("a cat [["), words.boxes]
    assert base.alone(["a cat "], "draw") == [1, *t.encode("a cat")]
    # Every turn is encoded on its own, as in training.
    turns = [("user", [ReadImage(1), "What?"]), ("assistant", ["A cat."]), ("user", ["Where?"])]
    assert tuned.dialogue(turns, system="Be brief.") == [
        1, *t.encode("Be brief.\n"), *t.encode("[INST]"), *words.read_ids(1), *after, *t.encode("A cat."),
        *t.encode("\n[INST] Where? [/INST]\n")]
    assert tuned.dialogue(turns[:1]) == tuned.dialogue(turns)[:len(tuned.dialogue(turns[:1]))]


def test_wrong_numbers_of_images(seedx_tokenizer: MultimodalTokenizer, tokenizer: MultimodalTokenizer) -> None:
    assert place_images("a", [1]) == [ReadImage(1), "a"]
    for text, pictures in (("<image> and <image>", [1]), ("<image>", [1, 1]), ("<image>", [])):
        with pytest.raises(RequestError, match=r"placeholders for \d images"):
            place_images(text, pictures)
    with pytest.raises(ConfigError, match="not SEED-X's"):
        SeedXPrompts(tokenizer)


@pytest.mark.parametrize(("text", "message"), [
    ("<box_start> <loc-1> <loc-2> <loc-3> <box_end>", "3 numbers instead of 4"), ("<box_start> <box_end>", "0 numbers"),
    ("<box_start> <loc-1> a <loc-2> <loc-3> <loc-4> <box_end>", "other words than locations"),
    ("<box_start> <loc-1> <loc-2> <loc-3> <loc-224> <box_end>", "outside the grid of 224"),
    ("<box_start> <loc-1> <loc-2> <loc-3> <loc-0> <box_end>", "no width or no height"),
    ("<box_start> <loc-1> <loc-2> <loc-3> <loc-4>", "not closed"),
    ("<box_start> <loc-1> <box_start> <loc-1>", "not closed"), ("a <box_end>", "stands without")])
def test_malformed_boxes_have_a_sentence_and_hide_no_other(text: str, message: str) -> None:
    good = " it <box_start> <loc-1> <loc-2>\n<loc-3> <loc-4> <box_end>." if "without" not in message else ""
    boxes, problems = read_boxes(text + good)
    assert boxes == ([Box(1, 2, 3, 4)] if good else [])
    assert message in problems[0] and all(problem.endswith(".") for problem in problems)


def test_boxes_behind_an_opened_one() -> None:
    text = "<loc-1><loc-2><loc-3><loc-4> <box_end> ]] and <box_start> <loc-5> <loc-6> <loc-7> <loc-8> <box_end>"
    assert read_boxes(text, opened=True) == ([Box(1, 2, 3, 4), Box(5, 6, 7, 8)], [])
    assert box_numbers(text, opened=True) == [[1, 2, 3, 4], [5, 6, 7, 8]] and box_numbers("none") == []
    assert read_boxes("a cat", opened=True)[1] == ["A box is not closed: 'a cat'."]
    assert without_words("A <b>cat</b> <loc-3>here.</s>") == "A cat here."


def test_boxes_of_rectangles() -> None:
    box = Box.around((302, 782, 918, 1082), (1200, 1200))
    assert box == Box(114, 174, 115, 56)
    assert Box.around((0, 0, 640, 480), (640, 480)) == Box(112, 112, 223, 223)
    assert Box(0, 223, 100, 100).corners((224, 224)) == (0, 173, 50, 224)  # cut off at the edges
    for wrong in ((0, 0, 641, 480), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 9, 5, 5), (0, float("nan"), 5, 5)):
        with pytest.raises(RequestError, match="not inside the image of 640 x 480"):
            Box.around(wrong, (640, 480))
    with pytest.raises(RequestError, match=r"Place 224 of a box is outside 0\.\.223"):
        Box(1, 1, 1, 224).ids(SeedXVocabulary())


def test_answer_text(seedx_tokenizer: MultimodalTokenizer) -> None:
    t = seedx_tokenizer
    words = t.vocabulary
    assert isinstance(words, SeedXVocabulary)
    cat = t.encode("a cat")
    assert answer_text([*cat, *words.run(), 2], t) == "a cat </img> </s>"
    assert answer_text([*words.run()[1:], *words.run()[:3]], t) == "</img> <img_00000> <img_00001>"  # broke off
    assert answer_text([*cat, words.eoi_id], t) == "a cat </img>"  # spontaneous
