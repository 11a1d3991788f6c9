"""Turns in every order, with every markup of images, in every prompt template."""

import re
from typing import Any

import pytest
from chat_templates import TEXT_TEMPLATES
from data_files import learned
from tiny.language import write_hub_tokenizer
from yaml_tables import read_tables

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats import conversations
from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.hub_tokenizer import HubTokenizer

ROLES = {"u": "user", "a": "assistant", "s": "system"}
TABLES = read_tables(__file__)


@pytest.fixture(scope="module")
def tokenizers(tokenizer, tmp_path_factory) -> dict[str, tuple[Any, str]]:
    """Template → tokenizer, and the template's name in options."""
    tokenizers = {name: (tokenizer, name) for name in ("vicuna", "llama2")}
    for name, case in TEXT_TEMPLATES.items():
        folder = write_hub_tokenizer(tmp_path_factory.mktemp(name), ["a question, an answer"], case)
        tokenizers[name] = (HubTokenizer.create(folder, 8192, 32), "chat")
    tokenizers["hub, vicuna"] = (tokenizers["qwen3"][0], "vicuna")
    return tokenizers


def text_of(ids: list[int], tokenizer) -> str:
    """The text of ids without images and white space."""
    texts = [tokenizer.decode([id]) for id in ids if not tokenizer.vocabulary.is_image_token(id)]
    return "".join("".join(texts).split())


@pytest.mark.parametrize("markup", TABLES["markup"], ids=str)
@pytest.mark.parametrize("order", TABLES["orders"])
def test_turns(tokenizers, codes, order, markup):
    # Each question and each answer that is left out has an image, too.
    case = TABLES["orders"][order]
    used = case["used"]
    turns = []
    images = []  # turns with one
    for index, author in enumerate(order):
        content = f"text {index}"
        mark = markup[len(images)] if author != "s" and len(images) < 2 else ""
        if mark:
            images.append(index)
            content = [mark, content] if isinstance(mark, dict) else f"{mark}\n{content}"
        turns.append({"role": ROLES[author], "content": content})
    record = {"messages": turns, "image_ids": [codes(index) for index in images]}
    if used is None:
        with pytest.raises(BadRecord, match="line 3"):
            with_messages(record, "line 3")
        return

    fields = with_messages(record, "line 3")
    repairs = {getattr(conversations, name) for name in case["repairs"]}
    kept = [int(number) for number in "".join(used)]
    for name, (tokenizer, template) in tokenizers.items():
        decoder = get_decoder("chat", tokenizer, {"template": template})
        sequence = decoder.decode(fields, SeededRandom(0))
        assert set(filter(None, sequence.repaired.split(", "))) == repairs, name
        # The images of the used turns, with all of their codes; no markup stays text.
        vocabulary = tokenizer.vocabulary
        kept_images = [code for index in images if index in kept for code in codes(index)]
        image_codes = vocabulary.code_to_id(kept_images)
        assert [id for id in sequence.ids if vocabulary.is_code_id(id)] == image_codes, name
        text = text_of(sequence.ids, tokenizer)
        assert "mage" not in text and "IMG" not in text, name
        assert order[0] != "s" or "text0" in text, name  # the system message
        # The end of every answer is learned, and nothing of a question.
        end = tokenizer.decode([tokenizer.eos_token_id])
        expected = [re.sub("(.)", r"text\1", numbers) + end for numbers in used[1::2]]
        assert text_of(learned(sequence), tokenizer) == "".join(expected), name


def test_unlearned_answers_are_context(tokenizers):
    # Answers that other programs mask are read before the next one, and neither they nor their
    # ends are learned.
    turns = [{"role": ROLES[author], "content": [f"text {n}"]} for n, author in enumerate("uaua")]
    masked = [turn | {"learned": index != 1} for index, turn in enumerate(turns)]
    for name, (tokenizer, template) in tokenizers.items():
        decoder = get_decoder("chat", tokenizer, {"template": template})
        whole = decoder.decode({"messages": turns}, SeededRandom(0))
        sequence = decoder.decode({"messages": masked}, SeededRandom(0))
        assert sequence.ids == whole.ids, name
        last = learned(sequence)
        assert last == learned(whole)[-len(last) :], name
        end = tokenizer.decode([tokenizer.eos_token_id])
        assert text_of(last, tokenizer) == f"text3{end}", name


@pytest.mark.parametrize("name", ["sft.text_conversation", "pretrain.text_conversation"])
@pytest.mark.parametrize("texts", [["a", "yes", "b", "no"], ["a", "yes", "b"], ["a"]], ids=len)
def test_turn_ends(tokenizers, name, texts):
    # With a template that ends turns by a token each end is learned, else as in the original. A
    # question without an answer teaches nothing, and is left out of instruction tuning.
    for tokenizer, template in tokenizers.values():
        options = {"template": template} if name.startswith("sft.") else {}
        decoder = get_decoder(name, tokenizer, options)
        sequence = decoder.decode({"data": texts}, SeededRandom(0))
        if len(texts) == 1:
            assert sequence.drop_reason
            continue
        assert bool(sequence.repaired) == (len(texts) == 3 and name.startswith("sft."))
        n_ends = len(texts) // 2 if options.get("template") == "chat" else 1
        assert sequence.labels.count(tokenizer.eos_token_id) == n_ends, template


@pytest.mark.parametrize("last", [["b"], ["b", ""]], ids=["no answer", "empty answer"])
@pytest.mark.parametrize("name", ["pretrain.text_conversation", "pretrain.visual_question"])
def test_a_last_question_of_pretraining_stays_without_an_answer(tokenizers, codes, name, last):
    for tokenizer, _ in tokenizers.values():
        fields = {"data": ["a", "yes", *last], "image_ids": codes(0)}
        sequence = get_decoder(name, tokenizer).decode(fields, SeededRandom(0))
        assert sequence.extra["text"].endswith("yes\nUSER: b\nASSISTANT: ")
        assert sequence.ids[-1] == sequence.labels[-1] == tokenizer.eos_token_id


def test_masked_images(tokenizers, codes):
    # Nothing of the masked side is learned, and all of the other one, `<img>` of an edit included;
    # also without a start token.
    for tokenizer, _ in tokenizers.values():
        image = tokenizer.vocabulary.image_ids(codes(0))
        end = tokenizer.eos_token_id
        for ratio, target in ((1.0, tokenizer.encode("a cat")), (0.0, image[1:])):
            options = {"mask_left_label": True, "reverse_ratio": ratio}
            fields = {"image_ids": codes(0), "text": "a cat"}
            decoder = get_decoder("pretrain.caption", tokenizer, options)
            assert learned(decoder.decode(fields, SeededRandom(0))) == [*target, end]
        edit = {"source_image_ids": codes(1), "target_image_ids": codes(0), "instruction": "blue"}
        sequence = get_decoder("pretrain.edit", tokenizer).decode(edit, SeededRandom(0))
        assert learned(sequence) == [*image, end]
