"""Kind `llm_inference_postprocess`: prompts and answers of the released inference scripts.

Checked: every prompt string and its ids (both ways of building them), the generation settings, what is printed, decoded
or raised for every generated answer, and the caption-to-image evaluation's prompts, settings and codes.
Not covered: `printed` and `saved` of the two whole script runs (the ids their stub model answered are not recorded),
and the names of the evaluation's files (made from captions, which is unsafe; the guidance scale is the caller's).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runner import assert_same, golden_tokenizer_folder, read_json

from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.system.config import RELEASED_GENERATION

KIND = "llm_inference_postprocess"
TEMPLATES = {"8b": "vicuna", "14b": "llama2"}
CAPTION_TO_IMAGE = {"temperature": 0.0, "num_beams": 4, "max_new_tokens": 120, "do_sample": False}


def check(folder: Path) -> None:
    tokenizer = MultimodalTokenizer.from_pretrained(golden_tokenizer_folder(folder))
    cases = read_json(folder / "cases.json")
    for size, template in TEMPLATES.items():
        if size in cases:
            check_script(cases[size], template, tokenizer)
    assert cases["decode_image_text"], "the fixture holds no answers"
    for case in cases["decode_image_text"]:
        check_answer(case, tokenizer)
    if "eval_caption_to_images" in cases:
        check_evaluation(cases["eval_caption_to_images"], tokenizer)


def check_script(case: dict[str, Any], name: str, tokenizer: MultimodalTokenizer) -> None:
    template = get_template(name)
    assert len(case["prompts"]) == len(case["calls"]) > 0
    for prompt, call in zip(case["prompts"], case["calls"], strict=True):
        turn = ("user", user_content(prompt["text"], template.user_prefix, template.user_suffix))
        assert_same(template.render_text([turn], tokenizer.vocabulary), prompt["text"], "prompt string")
        assert_same([tokenizer.encode(prompt["text"])], call["input_ids"], "ids of the prompt string")
        assert_same([tokenizer.encode_parts(template.render([turn]), add_bos=True)], call["input_ids"],
                    "ids of the prompt's parts")
        check_settings(GenerationSettings(**RELEASED_GENERATION), call["generation_config"])


def user_content(prompt: str, prefix: str, suffix: str) -> list[Any]:
    """What the user said, read back from a prompt: codes of pictures and texts."""
    assert prompt.startswith("<s>" + prefix) and prompt.endswith(suffix), f"unexpected prompt {prompt[:60]!r}"
    said = prompt[len("<s>" + prefix):len(prompt) - len(suffix)]
    pieces = re.split(r"<img>((?:<img_\d{5}>)*)</img>", said)
    content: list[Any] = []
    for place, piece in enumerate(pieces):
        content.append([int(code) for code in re.findall(r"\d{5}", piece)] if place % 2 else piece)
    return [part for part in content if part]


def check_settings(settings: GenerationSettings, expected: dict[str, Any]) -> None:
    assert_same({key: getattr(settings, key) for key in expected}, expected, "generation settings")


def check_answer(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    name = case["name"]
    actual = original_split(case["generate_ids"], tokenizer)
    assert_same(actual.printed, case["printed"], f"{name}: printed")
    decoded = [] if actual.codes is None else [[actual.codes]]
    assert_same(decoded, case["decoded_image_ids"], f"{name}: codes given to the decoder")
    assert_same(actual.error, case.get("error"), f"{name}: exception")
    saves = actual.codes is not None and actual.error is None
    assert_same(saves, bool(case["saved"]), f"{name}: whether a picture is saved")
    words = tokenizer.vocabulary
    if actual.codes and len(actual.codes) == words.tokens_per_image and min(actual.codes) >= 0:
        ours = [part.codes for part in split_answer(case["generate_ids"], tokenizer) if isinstance(part, ImagePart)]
        assert_same(ours[:1], [actual.codes], f"{name}: the first picture of the parsed answer")


def check_evaluation(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    boi = tokenizer.vocabulary.boi_id
    assert_same([[tokenizer.bos_id, boi]], case["first_prompt_ids"], "unconditional prompt")
    caption = PurePosixPath(case["saved_first"][0]).stem.removesuffix("_")
    assert_same([[*tokenizer.encode_parts([caption], add_bos=True), boi]], case["second_prompt_ids"],
                "caption prompt")
    expected = {**case["generation_config"], "max_new_tokens": case["max_new_tokens"]}
    check_settings(GenerationSettings(**CAPTION_TO_IMAGE), expected)
    codes = [[[codes_before_end(case[key], tokenizer.vocabulary)]] for key in ("generated_first", "generated_second")]
    assert_same(codes[0], case["negative_ids_first"], "unconditional codes")
    assert_same(codes[1], case["decode_image_ids_first"], "codes of the caption")


def codes_before_end(ids: Sequence[int], vocabulary: ImageVocabulary) -> list[int]:
    """Ids generated after a forced `<img>` -> what stands before the first `</img>`, minus the shift (not checked)."""
    ids = [int(id) for id in ids]
    end = ids.index(vocabulary.eoi_id) if vocabulary.eoi_id in ids else len(ids)
    return [id - vocabulary.n_text for id in ids[:end]]


@dataclass(frozen=True)
class OriginalAnswer:
    """Result of the released scripts for an answer: standard output, codes given to the decoder, the exception."""

    printed: str
    codes: list[int] | None = None
    error: str | None = None


def original_split(ids: Sequence[int], tokenizer: MultimodalTokenizer) -> OriginalAnswer:
    """Repeat the released scripts' post-processing, defects included."""
    ids = [int(id) for id in ids]
    vocabulary = tokenizer.vocabulary
    if vocabulary.boi_id not in ids and vocabulary.eoi_id not in ids:
        return OriginalAnswer(tokenizer.decode(ids, skip_special_tokens=True) + "\n")
    if vocabulary.boi_id not in ids or vocabulary.eoi_id not in ids:
        return OriginalAnswer("", error="IndexError: index 0 is out of bounds for dimension 0 with size 0")
    opening, closing = ids.index(vocabulary.boi_id), ids.index(vocabulary.eoi_id)
    printed = tokenizer.decode(ids[:opening], skip_special_tokens=True) + "\n" if opening else ""
    codes = [id - vocabulary.n_text for id in ids[opening + 1:closing]]
    # With no codes the decoder returns no picture, and the script takes the first of none.
    return OriginalAnswer(printed, codes, None if codes else "IndexError: list index out of range")
