"""Kind `llm_inference_postprocess`: prompts and answers of the original inference scripts.

Compared: every prompt string and its ids (built in both ways), the generation settings, the printed
text, codes and error of every answer, the prompts, settings and codes of the caption-to-image
evaluation. Not compared: `printed` and `saved` of the two whole script runs (the ids of their stub
model are not recorded), names of the evaluation's files (derived from captions, which is unsafe),
its guidance scale (an argument).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from runner import assert_same, golden_tokenizer_folder, read_json

from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.spec import ORIGINAL_GENERATION

TEMPLATES = {"8b": "vicuna", "14b": "llama2"}
CAPTION_TO_IMAGE = {"temperature": 0.0, "num_beams": 4, "max_new_tokens": 120, "do_sample": False}


def check(folder: Path) -> None:
    tokenizer = MultimodalTokenizer.from_pretrained(golden_tokenizer_folder(folder))
    cases = read_json(folder / "cases.json")
    for size in TEMPLATES.keys() & cases.keys():
        check_script(cases[size], TEMPLATES[size], tokenizer)
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
        spans = [
            span
            if isinstance(span, str)
            else "".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(span)))
            for span in template.render([turn])
        ]
        assert_same("<s>" + "".join(spans), prompt["text"], "prompt string")
        assert_same(
            [tokenizer.encode(prompt["text"])], call["input_ids"], "ids of the prompt string"
        )
        assert_same(
            [tokenizer.encode_parts(template.render([turn]), add_bos=True)],
            call["input_ids"],
            "ids of the prompt's parts",
        )
        check_settings(ORIGINAL_GENERATION, call["generation_config"])


def user_content(prompt: str, prefix: str, suffix: str) -> list[Any]:
    """The user's texts and codes of images, parsed from a prompt."""
    assert prompt.startswith("<s>" + prefix) and prompt.endswith(suffix), (
        f"unexpected prompt {prompt[:60]!r}"
    )
    pieces = re.split(
        r"<img>((?:<img_\d{5}>)*)</img>", prompt[len("<s>" + prefix) : len(prompt) - len(suffix)]
    )
    content: list[Any] = []
    for index, piece in enumerate(pieces):
        content.append([int(code) for code in re.findall(r"\d{5}", piece)] if index % 2 else piece)
    return [part for part in content if part]


def check_settings(options: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = GenerationSettings(**options)
    assert_same({key: getattr(settings, key) for key in expected}, expected, "generation settings")


def check_answer(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    """The original scripts' post-processing with its defects, and `AnswerReader` on whole
    images."""
    name = case["name"]
    vocabulary = tokenizer.vocabulary
    ids = [int(id) for id in case["generate_ids"]]
    printed, codes, error = original_split(ids, tokenizer)
    assert_same(printed, case["printed"], f"{name}: printed")
    assert_same(
        [] if codes is None else [[codes]],
        case["decoded_image_ids"],
        f"{name}: codes given to the decoder",
    )
    assert_same(error, case.get("error"), f"{name}: exception")
    assert_same(
        codes is not None and error is None,
        bool(case["saved"]),
        f"{name}: whether an image is saved",
    )
    if codes and len(codes) == vocabulary.tokens_per_image and min(codes) >= 0:
        ours = [
            part.codes
            for part in AnswerReader(tokenizer).read_all(ids).parts
            if isinstance(part, ImagePart)
        ]
        assert_same(ours[:1], [codes], f"{name}: the first image of the parsed answer")


def original_split(
    ids: list[int], tokenizer: MultimodalTokenizer
) -> tuple[str, list[int] | None, str | None]:
    """Printed text, codes for the decoder, the exception."""
    vocabulary = tokenizer.vocabulary
    if vocabulary.boi_id not in ids and vocabulary.eoi_id not in ids:
        return tokenizer.decode(ids, skip_special_tokens=True) + "\n", None, None
    if vocabulary.boi_id not in ids or vocabulary.eoi_id not in ids:
        return "", None, "IndexError: index 0 is out of bounds for dimension 0 with size 0"
    opening = ids.index(vocabulary.boi_id)
    printed = tokenizer.decode(ids[:opening], skip_special_tokens=True) + "\n" if opening else ""
    codes = codes_before_end(
        ids[opening + 1 :] if ids.index(vocabulary.eoi_id) > opening else [vocabulary.eoi_id],
        tokenizer,
    )
    # Without codes the decoder returns no image, and the script indexes an empty list.
    return printed, codes, None if codes else "IndexError: list index out of range"


def codes_before_end(ids: Sequence[int], tokenizer: MultimodalTokenizer) -> list[int]:
    """Ids generated after `<img>` → codes before the first `</img>`, in range or not."""
    vocabulary = tokenizer.vocabulary
    end = list(ids).index(vocabulary.eoi_id) if vocabulary.eoi_id in ids else len(ids)
    return [int(id) - vocabulary.n_text for id in ids[:end]]


def check_evaluation(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    boi = tokenizer.vocabulary.boi_id
    assert_same([[tokenizer.bos_token_id, boi]], case["first_prompt_ids"], "unconditional prompt")
    caption = PurePosixPath(case["saved_first"][0]).stem.removesuffix("_")
    assert_same(
        [[*tokenizer.encode_parts([caption], add_bos=True), boi]],
        case["second_prompt_ids"],
        "caption prompt",
    )
    check_settings(
        CAPTION_TO_IMAGE, {**case["generation_config"], "max_new_tokens": case["max_new_tokens"]}
    )
    for ids, codes in (
        ("generated_first", "negative_ids_first"),
        ("generated_second", "decode_image_ids_first"),
    ):
        assert_same([[codes_before_end(case[ids], tokenizer)]], case[codes], codes)


KINDS = {"llm_inference_postprocess": check}
