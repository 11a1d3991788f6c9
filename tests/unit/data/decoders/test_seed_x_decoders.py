"""SEED-X's decoders: what is read, written and learned, over-long samples, bad records (ids: golden fixtures)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.pictured import PictureDecoder, PictureSequence, batch_rows
from seed_multimodal.data.decoders.registry import get_decoder
from seed_multimodal.data.decoders.sequence import IGNORED, SeededDraws
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.seed_x.processing import Box, ReadImage, SeedXPrompts, place_images

TEXTS = ["[INST] What is this? [/INST]\n", "It is a red cat.", "Here is a picture. Generate an image: blue"] * 20


@dataclass
class Opened:
    """Stands for an opened picture."""

    size: tuple[int, int]


SQUARE, WIDE, SMALL = Opened((448, 448)), Opened((900, 450)), Opened((300, 300))  # 1x1, 2x1, 1x1


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> MultimodalTokenizer:
    return MultimodalTokenizer.train(TEXTS, tmp_path_factory.mktemp("words"), vocab_size=300, n_codes=6,
                                     tokens_per_image=4, n_locations=16)


def make(words: MultimodalTokenizer, name: str, **options: Any) -> PictureDecoder:
    decoder = get_decoder(f"seed_x.{name}", words, options)
    assert isinstance(decoder, PictureDecoder)
    return decoder


def learned(sequence: PictureSequence, words: MultimodalTokenizer) -> str:
    return " ".join(words.decode([label for label in sequence.labels if label != IGNORED]).split())


def test_an_edit_learns_its_answer_and_asks_as_inference_does(words: MultimodalTokenizer) -> None:
    fields = {"source_image": WIDE, "target_image": SQUARE, "instruction": "make it red"}
    seen = set()
    for seed in range(8):
        sequence = make(words, "edit").decode(fields, SeededDraws(seed))
        source, target = sequence.pictures
        assert (source.views, source.written, target.views, target.written) == (3, False, 2, True)
        assert source.uses == ([True] * 3, [False] * 3) and target.uses == ([False] * 2, [False, True])
        assert len(sequence.read) == 12 and len(sequence.written) == 4
        assert [sequence.ids[place] for place in sequence.written] == words.vocabulary.run()[1:-1]  # type: ignore[attr-defined]
        assert learned(sequence, words).endswith("<img> </s>")
        seen.add(learned(sequence, words).removesuffix(" <img> </s>"))
        asked = [SeedXPrompts(words).dialogue([("user", place_images(text, [3]))])
                 for text in ("make it red", "make it red<image>")]
        assert sequence.ids[:len(asked[0])] in asked
    assert len(seen) > 2
    polite = {**fields, "instruction_new": "Please make it red", "response": "Sure."}
    assert learned(make(words, "edit").decode(polite, SeededDraws(0)), words) == "Sure. <img> </s>"
    silent = make(words, "edit", use_polite_response=False).decode(fields, SeededDraws(0))
    assert learned(silent, words) == "<img> </s>"


def test_a_conversation_with_boxes(words: MultimodalTokenizer) -> None:
    """Boxes in the texts become words, and every turn begins as at inference."""
    box = "<box_start><loc-1><loc-2><loc-3><loc-4><box_end>"
    fields = {"image": SQUARE, "data": [f"What is {box}?", "It is a cat.", "And now?", f"Here {box}."]}
    sequence = make(words, "conversation").decode(fields, SeededDraws(1))
    ids = list(Box(1, 2, 3, 4).ids(words.vocabulary))  # type: ignore[arg-type]
    text = ",".join(map(str, sequence.ids))
    assert text.count(",".join(map(str, ids))) == 2
    assert learned(sequence, words).startswith("It is a cat. Here <box_start> <loc-1>")
    turns = [("user", [ReadImage(2), "x"]), ("assistant", ["It is a cat."]), ("user", ["And now?"])]
    tail = SeedXPrompts(words).dialogue(turns)[len(SeedXPrompts(words).dialogue(turns[:2])):]
    assert ",".join(map(str, tail)) in text


def test_a_placeholder_says_where_the_picture_stands(words: MultimodalTokenizer) -> None:
    """As at inference; it is never learned as letters, and no picture stands anywhere else."""
    prompts = SeedXPrompts(words)
    ask, edit = make(words, "conversation"), make(words, "edit")
    for seed in range(4):
        first = ask.decode({"image": SQUARE, "data": ["This <image>is what?", "A cat."]}, SeededDraws(seed))
        assert first.ids[:first.ids.index(words.eos_id)][:first.read[-1] + 2] == prompts.dialogue(
            [("user", ["This ", ReadImage(2), "is what?"])])[:first.read[-1] + 2]
        later = ask.decode({"image": SQUARE, "data": ["Say red.", "Red.", "<image>And this?", "A cat."]},
                           SeededDraws(seed))
        assert later.read[0] > len(words.encode("[INST] Say red. [/INST]\n Red.")) and len(later.pictures) == 1
        changed = edit.decode({"source_image": SQUARE, "target_image": SQUARE, "instruction": "Make <image> red"},
                              SeededDraws(seed))
        assert words.decode(changed.ids[1:]).startswith("[INST] Make <patch>")
        assert not any("image>" in words.decode(one.ids) for one in (first, later, changed))
    literal = make(words, "conversation", validate=False).decode(
        {"image": SQUARE, "data": ["<image> what?", "A cat."]}, SeededDraws(1))
    assert "<image> what?" in words.decode(literal.ids)  # as released


@pytest.mark.parametrize("value", [None, "", "none", "None", "null"])
def test_records_without_a_picture(words: MultimodalTokenizer, value: Any) -> None:
    decoder = make(words, "conversation")
    fields = {"image": value, "data": ["What?", "No."]}
    sequence = decoder.decode(fields, SeededDraws(1))
    assert not decoder.picture_fields(fields) and not sequence.pictures and not sequence.read
    batch = batch_rows([sequence], 40, 0)
    assert batch["patch_position"] is None and batch["embeds_cmp_mask"] is None


def test_a_path_with_null_in_it_is_a_picture(words: MultimodalTokenizer) -> None:
    fields = {"image": "a/nullable.png", "data": ["What?", "No."]}
    assert make(words, "conversation").picture_fields(fields) == ["image"]
    assert make(words, "conversation", validate=False).picture_fields(fields) == []  # as released
    with pytest.raises(BadRecord, match="image: must be an opened picture, not 'a/nullable.png'"):
        make(words, "conversation").decode(fields, SeededDraws(1))


def test_captions_too_long_to_draw_from_are_left_out_and_never_become_others(words: MultimodalTokenizer) -> None:
    decoder = make(words, "caption", img_first_ratio=-1.0, add_gen_prompt=True)
    short, long = {"image": SQUARE, "text": "a cat"}, {"image": SQUARE, "text": "a red cat " * 30}
    good = decoder(short, SeededDraws(3), 90)
    assert isinstance(good, PictureSequence) and learned(good, words) == "<img> </s>" and not good.read
    assert decoder(long, SeededDraws(3), 90) is None and "too long to draw from within 90" in decoder.reason
    released = make(words, "caption", img_first_ratio=-1.0, add_gen_prompt=True, validate=False)
    other = released.decode(long, SeededDraws(3), 90)
    assert other.read and not other.written and len(other) == 90  # the released defect
    # What fits by its own length is kept, although the released rule counts the views that are not written.
    exact = len(good)
    assert decoder.decode(short, SeededDraws(3), exact).ids == good.ids
    assert decoder.decode(short, SeededDraws(3), exact - 1).dropped


def test_captions_that_describe(words: MultimodalTokenizer) -> None:
    sequence = make(words, "caption", img_first_ratio=1.0).decode({"image": WIDE, "text": "a red cat"}, SeededDraws(0))
    assert learned(sequence, words) == "a red cat</s>" and len(sequence.read) == 12 and not sequence.written


@pytest.mark.parametrize(("metadata", "kept"), [
    ({"similarity": 0.1}, False), ({"similarity": 0.2}, True), ({"all_similarities": [0.1, 0.5]}, True),
    ({"SCORE": 0.05}, False), ({}, True), ('{"score": 0.05}', False)])
def test_similarity(words: MultimodalTokenizer, metadata: Any, kept: bool) -> None:
    decoder = make(words, "caption", similarity_thr=0.2)
    fields = {"image": SQUARE, "text": "a cat"}
    assert (decoder({**fields, "metadata": metadata}, SeededDraws(0)) is not None) == kept
    if isinstance(metadata, dict):  # a tar's json is the record itself
        assert (decoder({**fields, **metadata}, SeededDraws(0)) is not None) == kept
        assert kept or "is below 0.2" in decoder.reason


def test_small_and_narrow_pictures(words: MultimodalTokenizer) -> None:
    for options, reason in (({"min_resolution": 400}, "fewer than 400 pixels"),
                            ({"min_aspect_ratio": 0.6}, "narrower than 0.6")):
        for name, key in (("edit", "source_image"), ("caption", "image")):
            picture = SMALL if "min_resolution" in options else WIDE
            fields = {"target_image": SQUARE, "instruction": "x", "text": "x", key: picture}
            decoder = make(words, name, **options)
            assert decoder(fields, SeededDraws(0)) is None and reason in decoder.reason


def test_pictures_are_never_cut(words: MultimodalTokenizer) -> None:
    fields = {"image": SQUARE, "data": ["What? " * 9, "It is a cat. " * 9]}
    decoder = make(words, "conversation")
    whole = decoder.decode(fields, SeededDraws(1))
    for longest in range(1, len(whole) + 1):
        released = make(words, "conversation", validate=False).decode(fields, SeededDraws(1), longest)
        assert bool(released.dropped) == (longest <= max(whole.read) + 1)
        cut = decoder.decode(fields, SeededDraws(1), longest)
        assert bool(cut.dropped) == (longest <= max(whole.read) + 1 or not learned_within(whole, longest))
        if not cut.dropped:
            assert cut.ids == whole.ids[:longest] and batch_rows([cut], longest, 0)["ids_cmp_mask"][0].count(True) == 8
    edit = {"source_image": SQUARE, "target_image": SQUARE, "instruction": "red"}
    length = len(make(words, "edit").decode(edit, SeededDraws(1)))
    assert make(words, "edit").decode(edit, SeededDraws(1), length).dropped == (
        f"not fewer than {length} tokens")
    with pytest.raises(ValueError, match="does not fit into rows of 5"):
        batch_rows([whole], 5, 0)


def learned_within(sequence: PictureSequence, longest: int) -> bool:
    return any(label != IGNORED for label in sequence.labels[:longest])


def test_several_edits_follow_each_other_as_single_ones(words: MultimodalTokenizer) -> None:
    def user(*content: Any) -> dict[str, Any]:
        return {"role": "user", "content": list(content)}

    def drawn(picture: Opened, text: str = "Here.") -> dict[str, Any]:
        return {"role": "assistant", "content": [text, {"image": picture}]}

    messages = [user({"image": WIDE}, "red"), drawn(SQUARE), user("blue"), drawn(WIDE), user("What?"),
                {"role": "assistant", "content": "A cat."}, user("And?"), {"role": "assistant", "content": "No."}]
    sequence = make(words, "chat").decode({"messages": messages}, SeededDraws(0))
    assert [(picture.picture, picture.written) for picture in sequence.pictures] == [
        (WIDE, False), (SQUARE, True), (SQUARE, False), (WIDE, True), (WIDE, False)]  # shown again once each
    assert learned(sequence, words) == "Here. <img> Here. <img> A cat. No.</s>"
    plain = make(words, "chat", show_drawn=False).decode({"messages": messages}, SeededDraws(0))
    assert [picture.written for picture in plain.pictures] == [False, True, True]
    turns = [("user", [ReadImage(3), "red"])]
    asked = SeedXPrompts(words).dialogue(turns)
    assert sequence.ids[:len(asked)] == asked


def test_the_batch_has_every_view_in_order(words: MultimodalTokenizer) -> None:
    fields = {"source_image": WIDE, "target_image": SQUARE, "instruction": "x"}
    edit = make(words, "edit").decode(fields, SeededDraws(2))
    talk = make(words, "conversation").decode({"data": ["What?", "No."]}, SeededDraws(2))
    batch = batch_rows([edit, talk], 80, 0)
    assert batch["embeds_cmp_mask"] == [True, True, True, False, False]
    assert batch["embeds_gen_mask"] == [False, False, False, False, True]
    assert batch["patch_position"] == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert batch["images_patch_length"] == [3, 2] and batch["image_size"] == [[900, 450], [448, 448]]
    assert [len(row) for row in batch["input_ids"]] == [80, 80]
    assert sum(map(sum, batch["ids_cmp_mask"])) == 12 and sum(map(sum, batch["ids_gen_mask"])) == 4


TALK = {"image": SQUARE, "data": ["What?", "No."]}
EDIT = {"source_image": SQUARE, "target_image": SQUARE, "instruction": "red"}


@pytest.mark.parametrize(("name", "fields", "message"), [
    ("conversation", {"image": SQUARE}, "data: is missing"),
    ("conversation", {**TALK, "data": ["What?"]}, "come in pairs"),
    ("conversation", {**TALK, "data": [1, 2]}, "data.0."),
    ("conversation", {**TALK, "data": ["What?", " "]}, "nothing that could be learned"),
    ("conversation", {**TALK, "data": ["<img>?", "No."]}, r"data\[0\]: holds the control word '<img>'"),
    ("conversation", {**TALK, "data": ["a</s>b", "No."]}, "control word '</s>'"),
    ("conversation", {**TALK, "data": ["a", "<box_start><loc-1><box_end>"]}, r"data\[1\]: A box is not four"),
    ("conversation", {**TALK, "data": ["a", "<box_start><loc-1><loc-2><loc-3><loc-16><box_end>"]}, "below 16 with"),
    ("conversation", {**TALK, "data": ["<image> and <image>?", "No."]}, r"data\[0\]: 2 <image> placeholders for 1 pic"),
    ("conversation", {**TALK, "data": ["<image>?", "No.", "<image>?", "No."]}, r"data\[2\]: holds <image>, but no pic"),
    ("conversation", {**TALK, "data": ["What?", "<image>"]}, r"data\[1\]: holds <image>, but no picture stands there"),
    ("edit", {**EDIT, "instruction": "<image>"}, "instruction: is empty"),
    ("edit", {**EDIT, "instruction": "<image> as <image>"}, "instruction: 2 <image> placeholders for 1 picture"),
    ("edit", {**EDIT, "instruction_new": "Swap.", "response": "<image>"}, "response: holds <image>, but no picture"),
    ("caption", {"image": SQUARE, "text": "<image> a cat"}, "text: holds <image>, but no picture stands there"),
    ("edit", {**EDIT, "target_image": None}, "target_image: is missing"),
    ("edit", {**EDIT, "instruction": " "}, "instruction: is empty"),
    ("edit", {**EDIT, "instruction": 5}, "must be a text"),
    ("edit", {**EDIT, "source_image": "a.png"}, "source_image: must be an opened picture"),
    ("caption", {"image": SQUARE}, "text: is missing"), ("caption", {"text": "a"}, "image: is missing"),
    ("caption", {"image": SQUARE, "text": " . "}, "text: is empty"),
    ("caption", {"image": SQUARE, "text": "a", "metadata": "{"}, "metadata: is not json"),
    ("caption", {"image": SQUARE, "text": "a", "similarity": "high"}, "similarity: must be a number"),
    ("chat", {"messages": []}, "without an answer"), ("chat", {"messages": [{"role": "assistant"}]}, "user's turn"),
    ("chat", {"messages": [{"role": "user", "content": [5]}]}, "must be a text or a picture"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "must be a text or a list")])
def test_bad_records_are_one_sentence(words: MultimodalTokenizer, name: str, fields: Any, message: str) -> None:
    options = {"similarity_thr": 0.1} if name == "caption" else {}
    with pytest.raises(BadRecord, match=message) as caught:
        make(words, name, **options).decode(fields, SeededDraws(0))
    assert str(caught.value).endswith(".")


RELEASED = {  # of the released data files; what the loader takes (max_length, data_dir, ...) is left out
    "conversation": {"resolution_grids": ["1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2"]},
    "caption": {"similarity_thr": 0.1, "min_resolution": 400, "min_aspect_ratio": 0.6, "use_caption_in_metadata": False,
                "add_gen_prompt": True, "caption_key_in_metadata": "top_caption", "img_first_ratio": -1.0,
                "assure_text": True, "resolution_grids": ["1x1"]},
    "edit": {"min_resolution": 400, "min_aspect_ratio": 0.6, "prompt_drop_ratio": 0.0, "use_polite_response": True,
             "resolution_grids": ["1x1"]}}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_options_are_known(words: MultimodalTokenizer, name: str) -> None:
    shared = {"instruction_prompt": "[INST] {instruction} [/INST]\n", "num_img_in_tokens": 4, "num_img_out_tokens": 4,
              "multi_resolution": True, "base_resolution": 448}
    decoder = make(words, name, **shared, **RELEASED[name])
    assert decoder.options.resolution_grids == tuple(RELEASED[name]["resolution_grids"])


def test_wrong_options(words: MultimodalTokenizer, tmp_path: Path) -> None:
    for name, options, message in (("edit", {"num_img_in_token": 3}, "num_img_in_tokens"),
                                   ("edit", {"num_img_in_tokens": 9}, "cannot take 9 words; the tokenizer has 6"),
                                   ("edit", {"resolution_grids": ["2by1"]}, "not grids of views"),
                                   ("edit", {"instruction_prompt": "x"}, "instruction")):
        with pytest.raises(ConfigError, match=message):
            make(words, name, **options)
    other = MultimodalTokenizer.train(TEXTS, tmp_path, vocab_size=300, n_codes=6, tokens_per_image=4)
    with pytest.raises(ConfigError, match="not SEED-X's"):
        get_decoder("seed_x.edit", other)


def test_the_sentences_seen_in_recordings_are_at_their_places() -> None:
    assert phrases.SEEDX_DRAW_REQUESTS[14] == "Generate an image:" and phrases.SEEDX_EDIT_RESPONSES[-1] == ""
    assert len(set(phrases.SEEDX_DRAW_REQUESTS)) == 28 and len(set(phrases.SEEDX_EDIT_RESPONSES)) == 21
