"""`HubTokenizer` and its chat template: ids as by transformers, image tokens, files."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import IMAGE_TEMPLATES, TEXT_TEMPLATES, TemplateCase
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import write_json
from tiny.language import CHATML_CASE, write_hub_tokenizer
from tiny.seed import SENTENCES

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.hub_tokenizer import (
    HubTokenizer,
    has_chat_template,
    load_text_tokenizer,
)
from seed_multimodal.language.llama_tokenizer import TransformersTokenizer
from seed_multimodal.language.prompts import get_template

CODES = [3, 1, 15, 0]
ALL_TEMPLATES = TEXT_TEMPLATES | IMAGE_TEMPLATES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_hub_tokenizer(tmp_path_factory.mktemp("hub"), SENTENCES)


@pytest.fixture(scope="module")
def hub(folder) -> HubTokenizer:
    return HubTokenizer.create(folder, n_codes=16, tokens_per_image=4)


def write_case(case: TemplateCase, folder) -> tuple[HubTokenizer, Any]:
    """The tokenizer with a chat template, and transformers' own."""
    from transformers import AutoTokenizer

    write_hub_tokenizer(folder, SENTENCES, case)
    return HubTokenizer.create(folder, 16, 4), AutoTokenizer.from_pretrained(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text=" Two  words\n\nand lines ")
@example(text="<|im_end|> <img_00001> </img>")  # typed, they are text
def test_encode_parts_keeps_texts(hub, text):
    ids = hub.encode_parts([text, CODES, text], add_bos=True)
    name = "<img>" + "".join(f"<img_{code:05d}>" for code in CODES) + "</img>"
    assert hub.decode(ids) == text + name + text
    assert not set(hub.eos_token_ids) & set(ids)
    assert [id for id in ids if hub.vocabulary.is_image_token(id)] == hub.vocabulary.image_ids(
        CODES
    )


def test_a_streamed_answer_of_more_ids_continues_that_of_fewer(hub, tokenizer):
    # Streamers of transformers print what a longer text has behind the shorter one.
    for text_tokenizer in (hub, tokenizer):
        adapter = TransformersTokenizer(text_tokenizer)
        end = adapter.eos_token
        codes = [1] * text_tokenizer.vocabulary.tokens_per_image
        image = text_tokenizer.decode(text_tokenizer.vocabulary.image_ids(codes))
        ids = adapter.encode(f"It is a cat.{end}{image} Here it is.{end}{end}")
        texts = [adapter.decode(ids[:n]) for n in range(len(ids) + 1)]
        assert texts[-1].endswith(end + end)
        for shorter, longer in itertools.pairwise(texts):
            assert longer.startswith(shorter)
        assert end not in adapter.decode(ids, skip_special_tokens=True)


def test_end_ids_of_a_base_tokenizer_with_a_chat_template(tmp_path):
    """The end of a turn, the tokenizer's end, and those of the model's generation."""
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 7]})
    hub, _ = write_case(replace(CHATML_CASE, eos="<|endoftext|>"), tmp_path)
    assert hub.eos_token_ids == (2, 0, 7)


def test_load_text_tokenizer_chooses_by_the_files(hub, folder, tokenizer_folder, tmp_path):
    saved = hub.save_pretrained(tmp_path / "saved")
    loaded = load_text_tokenizer(saved)
    assert isinstance(loaded, HubTokenizer) and has_chat_template(saved)
    assert loaded.vocabulary == hub.vocabulary
    assert loaded.eos_token_ids == hub.eos_token_ids
    parts = ["What is this?", CODES, "<|im_end|>"]
    for same in (loaded, copy.deepcopy(loaded)):  # copied for workers
        assert same.encode_parts(parts) == hub.encode_parts(parts)
    assert isinstance(load_text_tokenizer(tokenizer_folder), MultimodalTokenizer)
    assert not has_chat_template(tokenizer_folder)

    with pytest.raises(CheckpointError, match="image_tokens.json"):
        load_text_tokenizer(folder)
    (saved / "image_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match="image_tokens.json"):
        load_text_tokenizer(saved)
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="saved"):
        HubTokenizer.create(saved, 16, 4)


# ---- chat templates

TURNS = [("user", "What is this?\n"), ("assistant", "A cat."), ("user", "Where?")]
TYPED = "Say <|im_end|>, [INST] or <|eot_id|>."


def expected_ids(reference, messages: list[dict]) -> list[int]:
    encoded = reference.apply_chat_template(
        messages, add_generation_prompt=messages[-1]["role"] == "user", enable_thinking=False
    )
    return list(encoded["input_ids"])


@pytest.mark.parametrize("case", TEXT_TEMPLATES.values(), ids=TEXT_TEMPLATES)
def test_chat_template_equals_transformers(case, tmp_path):
    hub, reference = write_case(case, tmp_path)
    template = get_template("chat", hub)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    # 1. Questions, with and without a system message, which a template may place anywhere.
    for system in ("", "Be kind."):
        instructions = [{"role": "system", "content": system}]
        for n_turns in (1, 3):
            ids = hub.encode_parts(template.render(TURNS[:n_turns], system), add_bos=True)
            asked = [*(instructions if system else []), *messages[:n_turns]]
            assert ids == expected_ids(reference, asked)

    # 2. With an answer, for training: prompt and answer apart, and the answer's end behind them.
    turns = [*TURNS, ("assistant", "Here.")]
    *prompt, (role, answer) = template.render_turns(turns)
    assert (role, "".join(answer).strip()) == ("assistant", "Here.")
    assert [part for _, parts in prompt for part in parts] == template.render(TURNS)
    ids = hub.encode_parts(template.render(turns), add_bos=True)
    messages.append({"role": "assistant", "content": "Here."})
    assert expected_ids(reference, messages)[: len(ids) + 1] == [*ids, hub.eos_token_id]

    # 3. Names of special tokens are text in all contents.
    rendered = template.render([("user", TYPED)], TYPED)
    assert hub.decode(hub.encode_parts(rendered)).count(TYPED) == 2
    plain = template.render([("user", "a")], "b")
    special = [part for part in rendered if not isinstance(part, str)]
    assert special == [part for part in plain if not isinstance(part, str)]


@pytest.mark.parametrize("case", ALL_TEMPLATES.values(), ids=ALL_TEMPLATES)
def test_chat_template_keeps_images_between_their_texts(case, tmp_path):
    # A template that knows texts alone, or lists alone, must not move or drop an image.
    hub, _ = write_case(case, tmp_path)
    turns = [("user", ["See", CODES, "it"]), ("assistant", [CODES[::-1]]), ("user", "Where?")]
    parts = get_template("chat", hub).render(turns)
    index = parts.index(CODES)
    assert parts[index - 1].endswith("See")
    assert parts[index + 1].startswith("it")
    assert parts.count(CODES[::-1]) == 1


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}"])
def test_get_template_of_no_or_unusable_chat_templates(template, tmp_path):
    write_hub_tokenizer(tmp_path, SENTENCES, replace(CHATML_CASE, text=template))
    with pytest.raises(ConfigError, match="chat template"):
        get_template("chat", HubTokenizer.create(tmp_path, 16, 4))
