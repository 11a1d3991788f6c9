"""The released decoders at nano's sizes: options, refusals that name the field, draws, noise (ids: golden fixtures)."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.registry import DECODERS, get_decoder, some_picture
from seed_multimodal.data.decoders.sequence import IGNORED, SeededDraws, TokenSequence, pad
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer


@pytest.fixture(scope="module")
def records(words: MultimodalTokenizer) -> dict[str, dict[str, Any]]:
    """A good record of every decoder."""
    size = words.vocabulary.tokens_per_image
    one, two, three = ([start + n for n in range(size)] for start in (0, 7, 20))
    pair = {"image_ids": one, "question": "What?", "answer": "red"}
    edit = {"source_image_ids": one, "target_image_ids": two, "instruction": "snow"}
    dialogue = {"question": "Question: a? Question: b?", "answer": "Answer: c Answer: d"}
    turns = ["hello", "hi", "what?", "that."]
    written = words.vocabulary.image_text(one)
    return {
        "pretrain.caption": {"image_ids": one, "text": "a cat"},
        "pretrain.interleaved": {"image_ids": [one, None, two], "texts": [None, "then", None], "metadata": {}},
        "pretrain.video": {"image_ids": one + two + three + one, "answer": "it runs"},
        "pretrain.text": {"text": "some words"}, "pretrain.edit": edit,
        "pretrain.retrieval": {"image_ids": one, "text": "a", "context": [{"image_ids": two, "text": "b"}]},
        "pretrain.caption_eval": {"image_ids": one, "context": [{"image_ids": two, "text": "b"}],
                                  "metadata": {"image_id": 3}},
        "pretrain.visual_question": {"image_ids": [one], "data": turns},
        "sft.visual_question": {"image_ids": [one, two], "instruction": "say", "outputs": "a cat"},
        "pretrain.text_conversation": {"data": turns}, "sft.text_conversation": {"data": turns},
        "sft.qa": pair, "sft.edit": edit, "sft.video": {**pair, "image_ids": one + two},
        "sft.difference": {**pair, "image_ids": one + two},
        "sft.story": {"image_ids": one + two + three, "caption0": "x", "caption1": "y", "caption2": "z"},
        "sft.multi_edit": {"image_ids": one + two, "instruction0": "snow"},
        "sft.conversation": {"image_ids": one, **dialogue},
        "sft.video_conversation": {"image_ids": one + two, **dialogue},
        "sft.interleaved": {"instruction": f"look {written} now", "response": f"{written} done"},
        "chat": {"messages": [{"role": "user", "content": [{"codes": one}, "q"]},
                              {"role": "assistant", "content": "a"}]},
    }


PICTURES = [name for name in DECODERS if name not in (
    "pretrain.text", "pretrain.text_conversation", "sft.text_conversation", "sft.interleaved")]


def changed(fields: dict[str, Any], codes: Any) -> dict[str, Any]:
    """The record with the first picture's codes replaced by what `codes` makes of them, wherever it stands."""
    fields = copy.deepcopy(fields)
    if "messages" in fields:
        part = fields["messages"][0]["content"][0]
        part["codes"] = codes(part["codes"])
        return fields
    name = "image_ids" if "image_ids" in fields else "source_image_ids"
    nested = isinstance(fields[name][0], list)
    fields[name] = [codes(fields[name][0]), *fields[name][1:]] if nested else codes(fields[name])
    return fields


# ---- every decoder


@pytest.mark.parametrize("name", DECODERS)
def test_good_records_give_sequences(words, records, name) -> None:
    decoder = get_decoder(name, words, {})
    whole = decoder(records[name], SeededDraws(3, 1))
    assert whole is not None and decoder.reason == "" and whole.ids[0] == words.bos_id
    assert len(whole.ids) == len(whole.labels)
    assert all(label in (IGNORED, id) for label, id in zip(whole.labels, whole.ids, strict=True))
    assert name == "pretrain.caption_eval" or whole.labels[-1] == whole.ids[-1] == words.eos_id
    assert decoder(records[name], SeededDraws(3, 1)) == whole  # nothing random but the draws; the record is as it was
    cut = decoder(records[name], SeededDraws(3, 1), 9)
    assert cut is not None and (cut.ids, cut.labels) == (whole.ids[:9], whole.labels[:9])


@pytest.mark.parametrize("name", PICTURES)
def test_codes_out_of_range_name_the_field(words, records, name) -> None:
    most = words.vocabulary.n_codes
    for wrong in (most, -1):
        fields = changed(records[name], lambda codes: [codes[0], wrong, *codes[2:]])  # noqa: B023
        for options in ({}, {"validate": False}):  # never another word's id
            with pytest.raises(BadRecord, match=rf"^\S*(image_ids|codes)\S*: code {wrong} at place 1 is outside "
                                                rf"0\.\.{most - 1}\.$") as error:
                get_decoder(name, words, options)(fields, SeededDraws(0))
            assert error.value.kind == "codes out of range"


@pytest.mark.parametrize("name", PICTURES)
def test_another_number_of_codes_names_the_field(words, records, name) -> None:
    with pytest.raises(BadRecord, match=r"^\S*(image_ids|codes)\S*: .*(codes|frames|pictures).*\.$"):
        get_decoder(name, words, {})(changed(records[name], lambda codes: codes[:-1]), SeededDraws(0))


@pytest.mark.parametrize("name", DECODERS)
def test_missing_keys_are_named(words, records, name) -> None:
    for key in records[name]:
        fields = {k: v for k, v in records[name].items() if k != key}
        if key == "caption2":  # a shorter story, but with a picture too many
            key = "image_ids"
        with pytest.raises(BadRecord, match=key) as error:
            get_decoder(name, words, {})(fields, SeededDraws(0))
        sentence = str(error.value)
        assert sentence.endswith(".") and ": " in sentence and "\n" not in sentence


@pytest.mark.parametrize("name", DECODERS)
def test_texts_of_another_type_are_refused(words, records, name) -> None:
    for key, value in records[name].items():
        if isinstance(value, str):
            with pytest.raises(BadRecord, match=rf"{key}: must be a text, not 5\."):
                get_decoder(name, words, {})({**records[name], key: 5}, SeededDraws(0))


@pytest.mark.parametrize("name", DECODERS)
def test_unknown_options_name_the_nearest(words, name) -> None:
    with pytest.raises(ConfigError, match=rf"decoder {name}: unknown key 'validat' \(did you mean 'validate'\?\)"):
        get_decoder(name, words, {"validat": True})


def test_unknown_decoder_names_the_nearest(words) -> None:
    with pytest.raises(ConfigError, match=r"no decoder 'pretrain\.captions' \(did you mean 'pretrain\.caption'\?\)"):
        get_decoder("pretrain.captions", words, {})


@pytest.mark.parametrize("name, options, sentence", [
    ("pretrain.caption", {"reverse_ratio": "half"}, "reverse_ratio: input should be a valid number"),
    ("pretrain.caption", {"caption_prompt": "{0} {1}"}, r"caption_prompt '\{0\} \{1\}' is no template"),
    ("pretrain.caption", {"caption_prompt": []}, "caption_prompt must be a text with"),
    ("pretrain.interleaved", {"max_images": 0}, "max_images must be at least 1, not 0"),
    ("pretrain.caption", {"code_noise": 1.5}, "code_noise must be at most 1, not 1.5"),
    ("pretrain.caption", {"code_noise": 0.5}, "code_noise needs a noise_source"),
    ("pretrain.text", {"code_noise": 0.5, "noise_source": min}, "there are none here"),
    ("sft.text_conversation", {"roles": "USER"}, "roles: input should be a valid tuple"),
    ("sft.difference", {"reverse_ratio": 0.5}, "reverse_ratio must be 0"),
])
def test_wrong_options_are_sentences(words, name, options, sentence) -> None:
    with pytest.raises(ConfigError, match=rf"^decoder {name}: .*{sentence}"):
        get_decoder(name, words, options)


# ---- what only some have


def test_dropped_samples_leave_a_reason(words, records) -> None:
    caption = get_decoder("pretrain.caption", words, {"mask_left_label": True, "reverse_ratio": 1.0})
    assert caption({**records["pretrain.caption"], "text": " .; "}, SeededDraws(0)) is None
    assert caption.reason == "the text is blank"
    assert caption(records["pretrain.caption"], SeededDraws(0), 5) is None
    assert caption.reason == "the left part does not end within 5 tokens"
    document = get_decoder("pretrain.interleaved", words, {})
    assert document({**records["pretrain.interleaved"], "texts": ["both", "then", None]}, SeededDraws(0)) is None
    assert document.reason == "place 0 of the document is not either a picture or a text"
    talk = get_decoder("sft.conversation", words, {})
    described = {**records["sft.conversation"], "question": "Image Descriptions Question: a?"}
    assert talk(described, SeededDraws(0)) is None and talk.reason == "there is no dialogue in it"


@pytest.mark.parametrize("name, key, sentence", [
    ("sft.conversation", "question", "question: has no 'Question:' marker, so there is no turn in it."),
    ("sft.video_conversation", "answer", "answer: has no 'Answer:' marker, so there is no turn in it.")])
def test_conversation_without_markers(words, records, name, key, sentence) -> None:
    fields = {**records[name], key: "no marker here"}
    with pytest.raises(BadRecord) as error:
        get_decoder(name, words, {})(fields, SeededDraws(0))
    assert str(error.value) == sentence
    if name == "sft.conversation":  # as released: an empty dialogue
        empty = get_decoder(name, words, {"validate": False})(fields, SeededDraws(0))
        assert empty is not None and empty.ids == [words.bos_id, words.eos_id]


@pytest.mark.parametrize("name, extra, sentence", [
    ("sft.story", {"caption3": "more"}, "image_ids: holds 3 pictures, but 4 captions mention 4."),
    ("sft.multi_edit", {"instruction1": "rain"}, "image_ids: holds 2 pictures, but 2 instructions mention 3."),
    ("pretrain.interleaved", {"texts": [None, "a"]},
     "image_ids: 3 places, but texts has 2; each place is one of both."),
    ("sft.video_conversation", {"answer": "Answer: c"}, "answer: holds 1 answers to 2 questions."),
    ("sft.interleaved", {"response": "see <img>"}, "response: a picture in it has no <img> or no </img>."),
    ("sft.text_conversation", {"data": ["q"]}, "data: holds 1 texts; questions and answers come in pairs."),
    ("pretrain.video", {"image_ids": []}, "image_ids: holds 0 frames, but num_frames is 4."),
])
def test_counts_that_differ(words, records, name, extra, sentence) -> None:
    with pytest.raises(DataError) as error:
        get_decoder(name, words, {})({**records[name], **extra}, SeededDraws(0))
    assert str(error.value) == sentence


def test_question_of_a_drawing_record_is_missed(words, records) -> None:
    fields = {"image_ids": records["sft.qa"]["image_ids"], "text": "a red car..."}
    with pytest.raises(BadRecord, match=r"question: is missing; decoder sft\.qa needs it\."):
        get_decoder("sft.qa", words, {})(fields, SeededDraws(0))
    drawn = {words.decode(get_decoder("sft.qa", words, {"reverse_ratio": -1.0})(fields, SeededDraws(n)).ids)
             for n in range(400)}
    for number, (request, response) in enumerate(zip(phrases.DRAW_REQUESTS, phrases.DRAW_RESPONSES, strict=True)):
        end = "?" if number >= 14 else "."
        assert any(f"{request} a red car{end}" in text and response in text for text in drawn), request
    assert len(drawn) == 20


def test_edits_draw_the_first_six_responses(words, records) -> None:
    learned = set()
    for seed in range(100):
        sequence = get_decoder("sft.edit", words, {})(records["sft.edit"], SeededDraws(seed))
        said = [id for id in sequence.labels if id != IGNORED]
        learned.add(words.decode(said[:said.index(words.vocabulary.boi_id)]).strip())
    assert learned == set(phrases.EDIT_RESPONSES[:6])


def test_named_images_of_differences(words, records) -> None:
    fields = {**records["sft.difference"], "question": "image A and image and image b?"}
    text = words.decode(get_decoder("sft.difference", words, {})(fields, SeededDraws(0)).ids)
    assert "the first image and image and the second image?" in text
    released = words.decode(get_decoder("sft.difference", words, {"validate": False})(fields, SeededDraws(0)).ids)
    assert "the first imagend" in released


def test_views_and_several_captions(words, records) -> None:
    one = records["pretrain.caption"]["image_ids"]
    fields = {"views": [one, one[::-1]], "text": ["a cat", "a small cat"]}
    decoder = get_decoder("pretrain.caption", words, {"reverse_ratio": 1.0})
    found = {tuple(decoder(fields, SeededDraws(seed)).ids) for seed in range(40)}
    assert found == {tuple(decoder({"image_ids": view, "text": text}, SeededDraws(0)).ids)
                     for view in fields["views"] for text in fields["text"]}
    written = get_decoder("pretrain.caption", words, {"reverse_ratio": 0.0})
    plain = {words.decode(written({**fields, "image_ids": one}, SeededDraws(seed)).ids) for seed in range(9)}
    assert len(plain) == 2 and all(words.vocabulary.image_text(one) in text.replace(" ", "") for text in plain)
    with pytest.raises(BadRecord, match=r"views: a picture has \d+ codes"):
        decoder({"views": [one[1:]], "text": "a"}, SeededDraws(0))


# ---- noise


READ = {"pretrain.video": 4, "pretrain.edit": 1, "sft.qa": 1, "sft.edit": 1, "sft.story": 1, "sft.difference": 2,
        "sft.conversation": 1, "sft.video": 2, "sft.video_conversation": 2, "sft.multi_edit": 1,
        "sft.visual_question": 2, "pretrain.visual_question": 1, "chat": 1}


@pytest.mark.parametrize("name", READ)
def test_noise_changes_the_pictures_that_are_read(words, records, name) -> None:
    other = [words.vocabulary.n_codes - 1] * words.vocabulary.tokens_per_image
    noisy = get_decoder(name, words, {"code_noise": 1.0, "noise_source": lambda draws: other})
    clean = get_decoder(name, words, {})(records[name], SeededDraws(0))
    changed = set()
    for seed in range(12):
        found = noisy(records[name], SeededDraws(seed))
        pictures = images(words, found.ids)
        changed |= {place for place, codes in enumerate(pictures) if other[0] in codes}
        assert len(pictures) == len(images(words, clean.ids))
        assert other[0] + words.vocabulary.n_text not in found.labels
    assert changed == set(range(READ[name]))


def images(words: MultimodalTokenizer, ids: list[int]) -> list[list[int]]:
    """The codes of all pictures of a sequence."""
    size = words.vocabulary.tokens_per_image
    starts = [place for place, id in enumerate(ids) if id == words.vocabulary.boi_id]
    return [words.vocabulary.id_to_code(ids[start + 1:start + 1 + size]) for start in starts]


def test_noise_of_captions_only_where_the_picture_is_first(words, records) -> None:
    other = [words.vocabulary.n_codes - 1] * words.vocabulary.tokens_per_image
    options = {"code_noise": 1.0, "noise_source": lambda draws: other}
    for name in ("pretrain.caption", "pretrain.retrieval"):
        last = get_decoder(name, words, {**options, "reverse_ratio": 0.0})
        first = get_decoder(name, words, {**options, "reverse_ratio": 1.0})
        fields = records[name]
        assert not any(other[0] in codes for n in range(9) for codes in images(words, last(fields, SeededDraws(n)).ids))
        assert any(other[0] in codes for n in range(9) for codes in images(words, first(fields, SeededDraws(n)).ids))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_record(words, records, name) -> None:
    size = words.vocabulary.tokens_per_image
    found = [some_picture(records[name], SeededDraws(n), size) for n in range(20)]
    assert all(codes is not None and len(codes) == size for codes in found)
    assert some_picture({"text": "none"}, SeededDraws(0), size) is None


def test_a_broken_record_has_no_picture_to_give() -> None:
    for broken in (7, "codes", ["a", None], [{"from": "human"}], [1.5], [[[]]], {"a": 1}):
        for key in ("image_ids", "views", "target_image_ids", "messages"):
            assert some_picture({key: broken}, SeededDraws(0), 4) is None


# ---- draws and padding


def test_draws_are_a_function_of_the_numbers() -> None:
    def several(*numbers: int) -> tuple[Any, ...]:
        draws = SeededDraws(*numbers)
        order = list(range(8))
        draws.shuffle(order)
        return draws.uniform(), draws.randint(0, 1000), draws.choice("abcdefgh"), order

    assert several(1, 2, 3) == several(1, 2, 3)
    assert len({str(several(*numbers)) for numbers in [(1,), (1, 2), (12,), (1, 2, 3), (1, 23), (0, 1), (-1,)]}) == 7
    assert all(0 <= SeededDraws(n).uniform() < 1 for n in range(50))
    assert {SeededDraws(n).randint(2, 4) for n in range(50)} == {2, 3, 4}
    # The draws of a run must be those of the run it resumes, also after an update of Python.
    assert several(5, 6) == (0.6832392450925442, 612, "e", [4, 1, 2, 5, 3, 0, 6, 7])


def test_padding_fills_and_cuts() -> None:
    sequence = TokenSequence([1, 5, 2], [IGNORED, 5, 2])
    assert pad(sequence, 5, 0) == {"input_ids": [1, 5, 2, 0, 0], "attention_mask": [1, 1, 1, 0, 0],
                                   "labels": [IGNORED, 5, 2, IGNORED, IGNORED]}
    assert pad(sequence, 2, 0) == {"input_ids": [1, 5], "attention_mask": [1, 1], "labels": [IGNORED, 5]}


@pytest.mark.parametrize(("name", "change", "sentence"), [
    ("pretrain.interleaved", {"image_ids": [], "texts": []}, "the record: holds nothing"),
    ("pretrain.interleaved", {"image_ids": [None], "texts": [" "]}, "the record: holds nothing"),
    ("pretrain.video", {"answer": " "}, "the record: holds nothing"),
    ("sft.interleaved", {"response": ""}, "the record: holds nothing"),
    ("sft.qa", {"answer": " "}, "answer: is empty"),
    ("sft.difference", {"answer": ""}, "answer: is empty"),
    ("sft.video", {"answer": ""}, "answer: is empty"),
    ("sft.video", {"image_ids": []}, "image_ids: holds no frame")])
def test_records_that_say_nothing_are_refused(words, records, name, change, sentence) -> None:
    """Of them only `</s>` or a full stop would be learned. To the letter as released they are taken."""
    fields = records[name] | change
    with pytest.raises(BadRecord, match=sentence):
        get_decoder(name, words)(fields, SeededDraws(0))
    assert get_decoder(name, words, {"validate": False})(fields, SeededDraws(0)) is not None


TUNED = [name for name in DECODERS if name.startswith("sft.") or name == "chat"]


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
@pytest.mark.parametrize("name", TUNED)
def test_questions_are_asked_as_the_trained_model_is(words, records, name, template) -> None:
    """Ids up to each answer are those of the template's own words around the same content, as at inference; what is
    learned is the same in both."""
    plain = get_decoder(name, words, {})(records[name], SeededDraws(3, 1))
    made = get_decoder(name, words, {"template": template})(records[name], SeededDraws(3, 1))
    assert [label for label in made.labels if label != IGNORED] == [one for one in plain.labels if one != IGNORED]
    assert template != "vicuna" or made == plain
    around = get_template(template)
    opened, closed, again = (words.encode_parts([text]) for text in (
        around.user_prefix.strip(), around.user_suffix, around.separator + around.user_prefix.strip()))
    asked = [id for id, label in zip(made.ids, made.labels, strict=True) if label == IGNORED]
    assert asked[1:1 + len(opened)] == opened
    assert closed[1:] == asked[-len(closed) + 1:]  # the blank before it belongs to the question
    turns = sum(1 for before, now in itertools.pairwise(made.labels) if before == IGNORED != now)
    marks = [start for start in range(len(asked)) if asked[start:start + len(again)] == again]
    assert len(marks) == turns - 1


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
def test_a_tuned_question_is_the_prompt_at_inference(words, codes, template) -> None:
    record = {"image_ids": codes(1), "question": "What is it?", "answer": "a cat"}
    made = get_decoder("sft.qa", words, {"template": template})(record, SeededDraws(3, 1))
    prompt = words.encode_parts(get_template(template).render([("user", [codes(1), "What is it?"])]), add_bos=True)
    assert made.ids[:len(prompt)] == prompt and made.labels[:len(prompt)] == [IGNORED] * len(prompt)
    assert made.labels[len(prompt)] != IGNORED
    talk = {"image_ids": codes(1), "question": "Question: What? Question: Red?", "answer": "Answer: Cat Answer: No"}
    made = get_decoder("sft.conversation", words, {"template": template})(talk, SeededDraws(3, 1))
    turns = [("user", [codes(1), "What?"]), ("assistant", "Cat."), ("user", "Red?")]
    prompt = words.encode_parts(get_template(template).render(turns), add_bos=True)
    assert made.ids[:len(prompt)] == prompt
    with pytest.raises(ConfigError, match="template must be one of vicuna, llama2"):
        get_decoder("sft.qa", words, {"template": "alpaca"})


def test_the_documentation_says_which_released_sentences_are_known() -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "multimodal-llm.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    assert "equal to the original's token for token" not in page
    for said in (f"{len(phrases.DRAW_KNOWN)} of the {len(phrases.DRAW_REQUESTS)} pairs that ask for a picture",
                 f"first {len(phrases.EDIT_KNOWN)} of the {len(phrases.EDIT_RESPONSES)} responses to an edit "
                 f"({phrases.EDIT_DRAWN} are ever drawn)",
                 f"{len(phrases.STORY_KNOWN)} of the {len(phrases.STORY_REQUESTS)} pairs of a story"):
        assert said in page
