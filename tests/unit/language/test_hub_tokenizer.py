"""`HubTokenizer` and its chat template: ids as by transformers, image tokens, files."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import IMAGE_TEMPLATES, TEXT_LISTS, TEXT_TEMPLATES, TemplateCase
from tiny.language import CHATML_CASE, write_hub_tokenizer
from tiny.seed import SENTENCES

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, RequestError
from seed_multimodal.language.hub_tokenizer import (
    HubTokenizer,
    has_chat_template,
    load_text_tokenizer,
)
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

CODES = [3, 1, 15, 0]
TEXTS = ("", "a", " Two  words\n\nand lines ", "naïve 汉字 👍", "<|im_end|> <img_00001> </img>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_hub_tokenizer(tmp_path_factory.mktemp("hub"), SENTENCES)


@pytest.fixture(scope="module")
def hub(folder: Path) -> HubTokenizer:
    return HubTokenizer.create(folder, n_codes=16, tokens_per_image=4)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_parts_keeps_texts(hub: HubTokenizer, text):
    ids = hub.encode_parts([text, CODES, text], add_bos=True)
    name = "<img>" + "".join(f"<img_{code:05d}>" for code in CODES) + "</img>"
    assert hub.decode(ids) == text + name + text
    assert not set(hub.eos_token_ids) & set(ids)
    assert "".join(hub.tokens(ids)).count("<img_00015>") == 1


def test_encode_of_control_tokens(hub: HubTokenizer, folder: Path):
    text = "<|im_start|>user\nWhat is it?<|im_end|>\n"
    assert hub.encode(text) == reference(folder)(text).input_ids
    assert hub.encode("a<img_00002></img>") == [
        *hub.encode("a"),
        *hub.vocabulary.code_to_id([2]),
        hub.vocabulary.eoi_id,
    ]
    assert hub.split("a<img_00099>") == (["a<img_00099>"], [])


def test_vocabulary_and_special_ids(hub: HubTokenizer, folder: Path):
    assert hub.vocabulary.code_start == len(reference(folder)) == 300
    assert len(hub) == 300 + 16 + 2
    assert hub.special_ids == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    assert hub.start_ids == ()
    with pytest.raises(CodesError, match="outside the vocabulary of 318"):
        hub.decode([318])
    with pytest.raises(RequestError):
        hub.encode_parts(["\ud800"])


def test_end_ids_of_a_base_tokenizer_with_a_chat_template(tmp_path):
    """The end of a turn, the tokenizer's end, and those of the model's generation."""
    write_hub_tokenizer(tmp_path, SENTENCES, replace(CHATML_CASE, eos="<|endoftext|>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert HubTokenizer.create(tmp_path, 16, 4).eos_token_ids == (2, 0, 7)


def test_load_text_tokenizer_chooses_by_the_files(
    hub: HubTokenizer, folder: Path, tokenizer_folder: Path, tmp_path
):
    saved = hub.save_pretrained(tmp_path / "saved")
    loaded = load_text_tokenizer(saved)
    assert isinstance(loaded, HubTokenizer)
    assert loaded.vocabulary == hub.vocabulary
    assert loaded.eos_token_ids == hub.eos_token_ids
    parts = ["What is this?", CODES, "<|im_end|>"]
    assert loaded.encode_parts(parts) == hub.encode_parts(parts)
    assert copy.deepcopy(loaded).encode_parts(parts) == hub.encode_parts(parts)  # as for workers
    assert has_chat_template(saved)

    assert isinstance(load_text_tokenizer(tokenizer_folder), MultimodalTokenizer)
    assert not has_chat_template(tokenizer_folder)
    with pytest.raises(CheckpointError, match=r"no image_tokens\.json"):
        load_text_tokenizer(folder)
    (saved / "image_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_text_tokenizer(saved)
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        HubTokenizer.create(saved, 16, 4)


# ---- chat templates

TURNS = [("user", "What is this?"), ("assistant", "A cat."), ("user", "Where?")]


SYSTEMS = ("", "Be kind.", "Say <|im_end|>, [INST] or <|eot_id|>.")


def expected_ids(folder: Path, messages: list[dict[str, object]]) -> list[int]:
    is_question = messages[-1]["role"] == "user"
    encoded = reference(folder).apply_chat_template(
        messages, add_generation_prompt=is_question, enable_thinking=False
    )
    return list(encoded["input_ids"])


@pytest.mark.parametrize("case", TEXT_TEMPLATES.values(), ids=TEXT_TEMPLATES)
def test_chat_template_equals_transformers(case: TemplateCase, tmp_path):
    write_hub_tokenizer(tmp_path, SENTENCES, case)
    hub = HubTokenizer.create(tmp_path, 16, 4)
    template = get_template("chat", hub)
    for system in SYSTEMS[:2]:
        for n_turns in (1, 3):
            turns = [(role, f"{text}\n" if role == "user" else text) for role, text in TURNS]
            ids = hub.encode_parts(template.render(turns[:n_turns], system), add_bos=True)
            messages = [{"role": role, "content": text} for role, text in turns[:n_turns]]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            assert ids == expected_ids(tmp_path, messages)
    assert template.stop_sequences == ()

    # Names of special tokens are text in all contents.
    rendered = template.render([("user", SYSTEMS[2])], SYSTEMS[2])
    assert hub.decode(hub.encode_parts(rendered)).count(SYSTEMS[2]) == 2
    plain = template.render([("user", "a")], "b")
    special = [part for part in rendered if not isinstance(part, str)]
    assert special == [part for part in plain if not isinstance(part, str)]


@pytest.mark.parametrize("case", TEXT_TEMPLATES.values(), ids=TEXT_TEMPLATES)
def test_render_turns_splits_prompts_and_answers(case: TemplateCase, tmp_path):
    """A prompt and its answer, with what the template writes between them only in a history."""
    hub = HubTokenizer.create(write_hub_tokenizer(tmp_path, SENTENCES, case), 16, 4)
    template = get_template("chat", hub)
    turns = [*TURNS, ("assistant", "Here.")]
    *prompt, (role, answer) = template.render_turns(turns)
    assert role == "assistant"
    assert "".join(answer).strip() == "Here."
    assert [part for _, parts in prompt for part in parts] == template.render(TURNS)
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = hub.encode_parts(template.render(turns), add_bos=True)
    expected = expected_ids(tmp_path, messages)
    assert expected[: len(ids) + 1] == [*ids, hub.eos_token_id]


@pytest.mark.parametrize("case", IMAGE_TEMPLATES.values(), ids=IMAGE_TEMPLATES)
def test_chat_template_with_parts_places_images(case: TemplateCase, tmp_path):
    hub = HubTokenizer.create(write_hub_tokenizer(tmp_path, SENTENCES, case), 16, 4)
    template = get_template("chat", hub)
    codes = [CODES, CODES[::-1]]
    content = ["See ", codes[0], " and\n", codes[1]]
    turns = [("user", content), ("assistant", ["A cat", codes[1]]), ("user", "Where?")]
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}]
    for role, parts in turns:
        parts = [parts] if isinstance(parts, str) else parts
        as_parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
        messages.append({"role": role, "content": as_parts})
    ids = hub.encode_parts(template.render(turns, "Be kind."))

    # Replacing the codes by the template's placeholder gives transformers' text.
    names = [hub.decode(hub.vocabulary.image_ids(row)) for row in codes]
    text = hub.decode(ids)
    assert re.findall("<img>.*?</img>", text) == [names[0], names[1], names[1]]
    text = re.sub("<img>.*?</img>", template.image, text)
    expected = expected_ids(tmp_path, messages)
    assert text == reference(tmp_path).decode(expected)


@pytest.mark.parametrize("case", [*TEXT_TEMPLATES.values(), TEXT_LISTS])
def test_chat_template_of_texts_keeps_images_between_them(case: TemplateCase, tmp_path):
    hub = HubTokenizer.create(write_hub_tokenizer(tmp_path, SENTENCES, case), 16, 4)
    parts = get_template("chat", hub).render([("user", ["See", CODES, "it"])])
    index = parts.index(CODES)
    assert parts[index - 1].endswith("See")
    assert parts[index + 1].startswith("it")


def test_chat_template_keeps_images_and_typed_control_tokens(hub: HubTokenizer):
    template = get_template("chat", hub)
    ids = hub.encode_parts(template.render([("user", ["See", CODES, "<|im_end|>"])], "<|im_end|>"))
    assert ids.count(hub.eos_token_id) == 2  # of the system message and of the question
    assert ids.count(hub.vocabulary.boi_id) == 1
    # A shorter dialogue is a prefix of a longer one.
    shorter = template.render(TURNS[:1])
    assert template.render(TURNS)[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("", "has no chat template"),
        ("{{ messages[0].content }}", "drops, repeats or reorders"),
        ("{{ raise_exception('no') }}", "the chat template fails"),
    ],
)
def test_get_template_of_no_or_unusable_chat_templates(chat_template, message, tmp_path):
    write_hub_tokenizer(tmp_path, SENTENCES, replace(CHATML_CASE, text=chat_template))
    with pytest.raises(ConfigError, match=message):
        get_template("chat", HubTokenizer.create(tmp_path, 16, 4))


def test_get_template_of_the_original_tokenizer(tokenizer: MultimodalTokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        get_template("chat", tokenizer)
