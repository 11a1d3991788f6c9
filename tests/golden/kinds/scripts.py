"""Kind `llm_inference_postprocess`: prompts and answers of the original inference scripts.

Compared: every prompt string and its ids (built in both ways), the generation settings, texts and
codes of the answers, the prompts, settings and codes of the caption-to-image evaluation. Not
compared: answers at which the original crashes or whose images are broken (`AnswerReader` has rules
of its own for them), `printed` and `saved` of the two whole script runs (the ids of their stub
model are not recorded), names of the evaluation's files (derived from captions, which is unsafe),
its guidance scale (an argument).
"""

import re
from pathlib import PurePosixPath

from runner import assert_same

from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed.spec import SeedLlamaConfig

TEMPLATES = {"8b": "vicuna", "14b": "llama2"}
CAPTION_TO_IMAGE = {"temperature": 0.0, "num_beams": 4, "max_new_tokens": 120, "do_sample": False}


def check(recording):
    tokenizer = MultimodalTokenizer.from_pretrained(recording.tokenizer_folder)
    cases = recording.cases
    for size in TEMPLATES.keys() & cases.keys():
        check_script(cases[size], TEMPLATES[size], tokenizer)
    for case in cases["decode_image_text"]:
        check_answer(case, tokenizer)
    if "eval_caption_to_images" in cases:
        check_evaluation(cases["eval_caption_to_images"], tokenizer)


def check_script(case, name, tokenizer):
    template = get_template(name)
    # Each prompt by the template, as one string and as its ids.
    for prompt, call in zip(case["prompts"], case["calls"], strict=True):
        text = prompt["text"]
        parts = template.render([("user", user_content(text, template))])
        spans = [
            part
            if isinstance(part, str)
            else "".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(part)))
            for part in parts
        ]
        assert_same("<s>" + "".join(spans), text, "prompt string")
        for ids in (tokenizer.encode(text), tokenizer.encode_parts(parts, add_bos=True)):
            assert_same([ids], call["input_ids"], "ids of the prompt")
        check_settings(SeedLlamaConfig.of_original("8b").generation, call["generation_config"])


def user_content(prompt: str, template) -> list:
    """The user's texts and codes of images, parsed from a prompt."""
    start = "<s>" + template.user_prefix
    end = template.user_suffix
    assert prompt.startswith(start) and prompt.endswith(end), f"unexpected prompt {prompt[:60]!r}"
    # Between them texts alternate with codes.
    text = prompt.removeprefix(start).removesuffix(end)
    pieces = re.split(r"<img>((?:<img_\d{5}>)*)</img>", text)
    content = [
        [int(code) for code in re.findall(r"\d{5}", piece)] if index % 2 else piece
        for index, piece in enumerate(pieces)
    ]
    return [part for part in content if part]


def check_settings(options, expected: dict):
    settings = GenerationSettings(**options)
    assert_same({key: getattr(settings, key) for key in expected}, expected, "generation settings")


def codes_of(ids: list[int], tokenizer) -> list[list[int]]:
    parts = AnswerReader(tokenizer).read_all(ids).parts
    return [list(part.codes) for part in parts if isinstance(part, ImagePart)]


def check_answer(case, tokenizer):
    """The text before an image, and its codes."""
    ids = [int(id) for id in case["generate_ids"]]
    vocabulary = tokenizer.vocabulary
    recorded = [codes for (codes,) in case["decoded_image_ids"]]
    if case.get("error"):
        return
    # The script printed what stands before the first image.
    opening = ids.index(vocabulary.boi_id) if recorded else len(ids)
    text = tokenizer.decode(ids[:opening], skip_special_tokens=True)
    printed = f"{text}\n" if opening or not recorded else ""
    assert_same(printed, case["printed"], f"{case['name']}: printed")
    # Only whole images have codes here.
    if not recorded or (len(recorded[0]), min(recorded[0]) >= 0) == (
        vocabulary.tokens_per_image,
        True,
    ):
        assert_same(codes_of(ids, tokenizer)[:1], recorded, f"{case['name']}: codes")


def check_evaluation(case, tokenizer):
    # The first prompt is empty: its image is the negative one of the second, the caption's.
    boi = tokenizer.vocabulary.boi_id
    caption = PurePosixPath(case["saved_first"][0]).stem.removesuffix("_")
    for parts, name in (([], "first_prompt_ids"), ([caption], "second_prompt_ids")):
        ids = [*tokenizer.encode_parts(parts, add_bos=True), boi]
        assert_same([ids], case[name], name)
    recorded = {**case["generation_config"], "max_new_tokens": case["max_new_tokens"]}
    check_settings(CAPTION_TO_IMAGE, recorded)
    for ids, codes in (
        ("generated_first", "negative_ids_first"),
        ("generated_second", "decode_image_ids_first"),
    ):
        assert_same([codes_of([boi, *case[ids]], tokenizer)], case[codes], codes)


KINDS = {"llm_inference_postprocess": check}
