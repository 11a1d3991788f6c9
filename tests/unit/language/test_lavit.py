"""LaVIT's ids, prompts padded on the left, texts cut as released, questions of the benchmarks, the lemmatiser."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, RequestError, SeedWarning
from seed_multimodal.language.lavit import (
    LavitTokenizer,
    LavitWords,
    QuestionProcessor,
    answer_of,
    caption_of,
    question_prompts,
    understand_inputs,
)
from seed_multimodal.language.lemmatizer import Lemmatizer


@pytest.fixture
def tokenizer(lavit_tokenizer: LavitTokenizer) -> LavitTokenizer:
    return lavit_tokenizer


# ---- ids


def test_released_ids() -> None:
    words = LavitWords()
    assert (words.boi_id, words.eoi_id, words.code_start, words.size) == (32000, 32001, 32002, 48386)
    assert words.code_to_id([0, 16383]) == [32002, 48385] and words.id_to_code([48385]) == [16383]


def test_only_codes_are_left_of_what_was_written() -> None:
    written = [32000, 0, 32002, 1, 48385, 32000, 31999, 48386, 48500, 32001, 2, 2]
    assert LavitWords().codes_of(written).tolist() == [0, 16383]
    assert LavitWords().codes_of(torch.tensor([32001, 2])).tolist() == []


@pytest.mark.parametrize("codes", [[], [24], [-1], [0] * 7])
def test_pictures_outside_the_codebook_are_refused(codes: list[int], tokenizer: LavitTokenizer) -> None:
    with pytest.raises(CodesError, match=r"\.$"):
        tokenizer.drawing_ids(["a cat", codes])


def test_a_language_model_needs_a_row_for_each_word() -> None:
    LavitWords().check_rows(48386, "llm")
    LavitWords().check_rows(48640, "llm")  # padding
    with pytest.raises(CheckpointError, match="48386; they do not belong together"):
        LavitWords().check_rows(32000, "llm")


# ---- the tokenizer


def test_the_folder_is_a_plain_llama_tokenizer(tokenizer: LavitTokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "kept")
    assert not (folder / "added_tokens.json").exists()
    again = LavitTokenizer.from_pretrained(folder)
    assert again.vocabulary == tokenizer.vocabulary == LavitWords(330, 24, 6)
    from transformers import LlamaTokenizer

    stock = LlamaTokenizer.from_pretrained(folder)
    for text in ("USER: What is it?\nASSISTANT:It is a cat.", "Question: is it? Answer:", "two  blanks, ünïcode 7"):
        ids = tokenizer.text_ids(text)
        assert ids == stock.encode(text, add_special_tokens=False)
        assert tokenizer.decode([*ids, 2, 2]) == stock.decode([*ids, 2, 2], skip_special_tokens=True) == text
    assert len(stock) == 330


def test_names_of_control_words_in_a_text_are_letters(tokenizer: LavitTokenizer) -> None:
    assert not {0, 1, 2} & set(tokenizer.text_ids("a</s>cat<img>"))


def test_image_words_have_no_text(tokenizer: LavitTokenizer) -> None:
    words = tokenizer.vocabulary
    assert tokenizer.decode([*tokenizer.text_ids("a cat"), *words.image_ids([3, 4])]) == "a cat"
    with pytest.raises(CodesError, match="cannot be written as text"):
        words.image_text([1])


def test_a_folder_without_layout_has_the_released_one(tokenizer: LavitTokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "released")
    (folder / "tokenizer_config.json").unlink()
    assert LavitTokenizer.from_pretrained(folder).vocabulary == LavitWords()
    assert LavitTokenizer.from_pretrained(folder, LavitWords(400, 5)).vocabulary.boi_id == 400
    with pytest.raises(CheckpointError, match="has 330 pieces, but the model's image words begin at 100"):
        LavitTokenizer.from_pretrained(folder, LavitWords(100, 5))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.model: this tokenizer file is missing or empty"):
        LavitTokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"\(it must hold tokenizer.model\)"):
        LavitTokenizer.from_pretrained(tmp_path / "nowhere")


def test_a_wrong_number_of_codes_in_the_folder_is_one_sentence(tokenizer: LavitTokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save_pretrained(tmp_path / "wrong")
    (folder / "tokenizer_config.json").write_text('{"image_codes": "many"}')
    with pytest.raises(ConfigError, match="image_codes"):
        LavitTokenizer.from_pretrained(folder)


def test_texts_and_pictures_in_order(tokenizer: LavitTokenizer) -> None:
    start = tokenizer.vocabulary.code_start
    ids = tokenizer.drawing_ids([torch.tensor([3, 0]), "a red apple", [23]])
    assert ids == [start + 3, start, *tokenizer.text_ids("a red apple"), start + 23]


# ---- what the language model reads


def reader(tokenizer: LavitTokenizer) -> SimpleNamespace:
    """An embedding table whose rows say their ids."""
    table = nn.Embedding(tokenizer.vocabulary.size, 2)
    with torch.no_grad():
        table.weight.copy_(torch.arange(len(table.weight))[:, None].expand(-1, 2))
    return SimpleNamespace(get_input_embeddings=lambda: table)


@pytest.mark.parametrize("side", ["caption", "answer"])
def test_where_padding_stands(side: str, tokenizer: LavitTokenizer) -> None:
    features = [torch.full((2, 2), 1000.0), torch.full((1, 2), 1001.0)]
    texts = ["a", "It is a dog."]
    short, long = map(tokenizer.text_ids, texts)
    gap = [-2] * (len(long) - len(short))  # masked places, whatever is in them
    embeds, mask = understand_inputs(reader(tokenizer), tokenizer, features, texts, side)
    shown = [[int(value) if seen else -2 for value, seen in zip(row[:, 0], line, strict=True)]
             for row, line in zip(embeds.detach(), mask, strict=True)]
    first = [330, 1000, 1000, 331]
    assert shown[0] == ([*gap, *first, *short] if side == "answer" else [*first, *gap, *short])
    assert shown[1] == [-2, 330, 1001, 331, *long]
    assert set(embeds.detach()[mask == 0].flatten().tolist()) == {2.0}  # the end word pads


@pytest.mark.parametrize("side", ["caption", "answer"])
def test_a_row_without_a_text_ends_with_its_picture(side: str, tokenizer: LavitTokenizer) -> None:
    features = [torch.full((2, 2), 1000.0), torch.full((1, 2), 1001.0)]
    embeds, mask = understand_inputs(reader(tokenizer), tokenizer, features, ["", "It is a dog."], side)
    assert embeds[0, -4:, 0].tolist() == [330, 1000, 1000, 331] and mask[0].sum() == 4 and mask[:, -1].all()


def test_pictures_alone_and_one_text_for_all(tokenizer: LavitTokenizer) -> None:
    features = [torch.zeros(1, 2), torch.zeros(4, 2)]
    assert understand_inputs(reader(tokenizer), tokenizer, features)[1].tolist() == [[0] * 3 + [1] * 3, [1] * 6]
    both, mask = understand_inputs(reader(tokenizer), tokenizer, features, "It is")
    assert torch.equal(both[0, -3:], both[1, -3:]) and mask[:, -1].all()
    with pytest.raises(RequestError, match="2 pictures, but 3 texts"):
        understand_inputs(reader(tokenizer), tokenizer, features, ["a", "b", "c"])
    with pytest.raises(RequestError, match="no picture"):
        understand_inputs(reader(tokenizer), tokenizer, [], "a")


def test_questions_in_their_template() -> None:
    assert question_prompts("Is it {red}?") == ["Question: Is it {red}? Answer:"]
    assert question_prompts(["a", "b"], "") == question_prompts(["a", "b"], None) == ["a", "b"]
    for template in ("{} or {}?", "{question}", "{", "What is it?"):
        with pytest.raises(RequestError, match="cannot be filled"):
            question_prompts(["a"], template)
    with pytest.raises(RequestError, match="The question must be a text, not NoneType"):
        question_prompts([None])


# ---- what becomes of its texts


@pytest.mark.parametrize(("text", "caption"), [
    ("Dr. Smith smiles.", "Dr"), (" a dog ", "a dog"), (". a", ""), ("a, b\nc", "a, b\nc"), ("", "")])
def test_captions_end_at_the_first_full_stop(text: str, caption: str) -> None:
    assert caption_of(text) == caption


@pytest.mark.parametrize(("text", "answer"), [
    (" yes ", "yes"), ("yes, it is", "yes"), ("on a mat. Or not", "on a mat"), ("red\nQuestion: why?", "red"),
    ("red question: why", "red "), ("red Long answer: dark", "red "), ("long answer: x", "long answer: x"),
    ("3.5", "3"), ("", ""), ("\n", ""), (",", "")])
def test_answers_end_at_the_first_of_several_words(text: str, answer: str) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(("question", "cleaned"), [
    ("Is the ratio 3.5:1?", "is the ratio 351?"), ('What "IS" (this)! ', "what is this"),
    ("a b c d e f g", "a b c d e"), ("a  b c d", "a  b c d"), ("", "")])
def test_questions_of_the_benchmarks(question: str, cleaned: str) -> None:
    assert QuestionProcessor(5)(question) == cleaned


def test_questions_have_fifty_words_at_most() -> None:
    assert len(QuestionProcessor()("word " * 70).split()) == 50
    with pytest.raises(ConfigError, match="max_words"):
        QuestionProcessor(0)


# ---- the lemmatiser


def test_without_the_lemmatiser_answers_stay_as_they_are() -> None:
    plain = Lemmatizer("none")
    assert not plain.uses_spacy and plain("Red  Dogs ") == "red dogs"
    with pytest.raises(ConfigError, match="auto"):
        Lemmatizer("maybe")  # type: ignore[arg-type]


def test_a_missing_model_of_spacy_is_one_sentence() -> None:
    """Holds with and without spaCy: nobody has a model of this name."""
    with pytest.warns(SeedWarning, match="are not lemmatised as the released model's are") as told:
        there = Lemmatizer("auto", model="xx_no_such_model")
    assert len(told) == 1 and not there.uses_spacy and there("Two Dogs") == "two dogs"
    with pytest.raises(ConfigError, match="pip install spacy, then python -m spacy download xx_no_such_model"):
        Lemmatizer("spacy", model="xx_no_such_model")


def test_missing_spacy_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)  # Python's own way to say that there is none
    with pytest.warns(SeedWarning, match="spaCy or its model en_core_web_sm is not there"):
        assert Lemmatizer()("Two Dogs") == "two dogs"
    with pytest.raises(ConfigError, match="pip install spacy, then python -m spacy download en_core_web_sm"):
        Lemmatizer("spacy")


def test_nouns_and_verbs_become_their_base_forms(tmp_path: Path) -> None:
    """With a real pipeline of spaCy, whose word lists are made here."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    kinds = {"dogs": "NOUN", "running": "VERB", "better": "ADJ", "two": "NUM", "do": "VERB"}
    rules = pipeline.add_pipe("attribute_ruler")
    for word, kind in kinds.items():
        rules.add([[{"LOWER": word}]], {"POS": kind})
    lemmas = pytest.importorskip("spacy.lookups").Lookups()
    lemmas.add_table("lemma_lookup", {"dogs": "dog", "running": "run", "better": "good"})
    pipeline.add_pipe("lemmatizer", config={"mode": "lookup"}).initialize(lookups=lemmas)
    pipeline.to_disk(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeedWarning)
        words = Lemmatizer("spacy", model=str(tmp_path / "model"))
    assert words.uses_spacy and words("Two Dogs running better") == "two dog run better"
    assert words("don't") == "do n't"
