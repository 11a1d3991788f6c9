"""Kind `lavit_understanding`: embeddings and masks of pictures and questions, captions and answers before lemmatising,
settings of both generations, questions of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.language.lavit import (
    LavitWords,
    QuestionProcessor,
    answer_of,
    caption_of,
    picture_inputs,
    with_text,
)
from seed_multimodal.language.lavit_generation import ANSWERS, CAPTIONS, WritingSettings

KIND = "lavit_understanding"
QUESTION_WORDS = 5


def check(folder: Path) -> None:
    cases, inputs, outputs = read_json(folder / "cases.json"), *(
        read_tensors(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    words, width = LavitWords(), outputs["visual.embeds"].shape[-1]
    table = torch.sin(torch.arange(words.code_start * width, dtype=torch.float32)).view(-1, width)
    features = [inputs[f"features.{place}"] for place in range(len(cases["counts"]))]
    assert_same([len(row) for row in features], cases["counts"], "numbers of tokens")
    picture = picture_inputs(table.__getitem__, words, features)
    assert_close(picture[0], outputs["visual.embeds"], 1e-6, what="pictures")
    assert_same(picture[1].tolist(), outputs["visual.attention"].tolist(), "mask of the pictures")
    text = table[inputs["prompt_ids"]], inputs["prompt_attention"]
    joined, mask = with_text(picture, text, "answer")
    assert_close(joined, outputs["joined.embeds"], 1e-6, what="pictures and questions")
    assert_same(mask.tolist(), outputs["joined.attention"].tolist(), "mask of pictures and questions")
    check_texts(cases)
    check_settings(CAPTIONS, cases["caption_generation_settings"], words)
    check_settings(ANSWERS, cases["answer_generation_settings"], words)


def check_texts(cases: dict[str, Any]) -> None:
    for case in cases["caption"]:
        assert_same([caption_of(case["decoded"])] * 2, [case["result"], case["result_with_prompt"]], case["decoded"])
    for case in cases["answers"]:
        assert_same(answer_of(case["decoded"]), case["result_before_lemmatising"], case["decoded"])
    for question, cleaned in cases["question_processor"]:
        assert_same(QuestionProcessor(QUESTION_WORDS)(question), cleaned, question)
    assert cases["caption"] and cases["answers"] and cases["question_processor"], "the fixture holds no texts"


def check_settings(settings: WritingSettings, recorded: dict[str, Any], words: LavitWords) -> None:
    assert_same(recorded["suppress_tokens"], [words.boi_id, words.size - 1, words.size - words.boi_id], "no image word")
    ours = {"do_sample": settings.samples, "temperature": settings.temperature, "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens, "min_new_tokens": settings.min_new_tokens,
            "repetition_penalty": settings.repetition_penalty, "length_penalty": settings.length_penalty,
            "num_return_sequences": settings.number, "early_stopping": settings.early_stopping,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for key, value in ours.items():
        if key in recorded:
            assert_same(value, recorded[key], key)
