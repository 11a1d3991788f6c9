"""Kind `llm_inference_postprocess`: prompts and answers of the released inference scripts.

Checked: every prompt string and its ids (both ways of building them), the generation settings, what is printed, decoded
or raised for every generated answer, and the caption-to-image evaluation's prompts, settings and codes.
Not covered: `printed` and `saved` of the two whole script runs (the ids their stub model answered are not recorded),
and the names of the evaluation's files (made from captions, which is unsafe; the guidance scale is the caller's).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from runner import assert_same, golden_tokenizer_folder, read_json

from seed_multimodal.language.answer import codes_before_end, original_split
from seed_multimodal.language.generation import GenerationSettings, released_settings
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

KIND = "llm_inference_postprocess"
TEMPLATES = {"8b": "vicuna", "14b": "llama2"}


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
        check_settings("script", call["generation_config"])


def user_content(prompt: str, prefix: str, suffix: str) -> list[Any]:
    """What the user said, read back from a prompt: codes of pictures and texts."""
    assert prompt.startswith("<s>" + prefix) and prompt.endswith(suffix), f"unexpected prompt {prompt[:60]!r}"
    said = prompt[len("<s>" + prefix):len(prompt) - len(suffix)]
    pieces = re.split(r"<img>((?:<img_\d{5}>)*)</img>", said)
    content: list[Any] = []
    for place, piece in enumerate(pieces):
        content.append([int(code) for code in re.findall(r"\d{5}", piece)] if place % 2 else piece)
    return [part for part in content if part]


def check_settings(program: str, expected: dict[str, Any]) -> None:
    settings = GenerationSettings(**released_settings(program))
    assert_same({key: getattr(settings, key) for key in expected}, expected, f"generation settings of {program}")


def check_answer(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    name = case["name"]
    actual = original_split(case["generate_ids"], tokenizer)
    assert_same(actual.printed, case["printed"], f"{name}: printed")
    decoded = [] if actual.codes is None else [[actual.codes]]
    assert_same(decoded, case["decoded_image_ids"], f"{name}: codes given to the decoder")
    assert_same(actual.error, case.get("error"), f"{name}: exception")
    saves = actual.codes is not None and actual.error is None
    assert_same(saves, bool(case["saved"]), f"{name}: whether a picture is saved")


def check_evaluation(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    boi = tokenizer.vocabulary.boi_id
    assert_same([[tokenizer.bos_id, boi]], case["first_prompt_ids"], "unconditional prompt")
    caption = PurePosixPath(case["saved_first"][0]).stem.removesuffix("_")
    assert_same([[*tokenizer.encode_parts([caption], add_bos=True), boi]], case["second_prompt_ids"],
                "caption prompt")
    check_settings("caption_to_image", {**case["generation_config"], "max_new_tokens": case["max_new_tokens"]})
    codes = [[[codes_before_end(case[key], tokenizer.vocabulary)]] for key in ("generated_first", "generated_second")]
    assert_same(codes[0], case["negative_ids_first"], "unconditional codes")
    assert_same(codes[1], case["decode_image_ids_first"], "codes of the caption")
