"""Kind `lavit_understanding`: embeddings and masks of pictures and questions, captions and answers before lemmatising,
settings of both generations, questions of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.language.generation import GenerationSettings, pad_left
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.lavit.pipeline import Lavit
from seed_multimodal.lavit.processing import ANSWER_ENDS, CAPTION_ENDS, LavitWords, QuestionProcessor, read_prompt

KIND = "lavit_understanding"
QUESTION_WORDS = 5


def check(folder: Path) -> None:
    cases, inputs, outputs = read_json(folder / "cases.json"), *(
        read_tensors(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    words, width = LavitWords(), outputs["visual.embeds"].shape[-1]
    table = torch.sin(torch.arange(words.code_start * width, dtype=torch.float32)).view(-1, width)
    features = [inputs[f"features.{place}"] for place in range(len(cases["counts"]))]
    assert_same([len(row) for row in features], cases["counts"], "numbers of tokens")
    embed = table.__getitem__
    pictures, mask = pad_left([read_prompt(embed, words, [row]) for row in features], embed, 2)
    assert_close(pictures, outputs["visual.embeds"], 1e-6, what="pictures")
    assert_same(mask.tolist(), outputs["visual.attention"].tolist(), "mask of the pictures")
    prompts = zip(inputs["prompt_ids"], inputs["prompt_attention"], strict=True)
    texts = [ids[seen.bool()].tolist() for ids, seen in prompts]
    rows = [read_prompt(embed, words, [row], text) for row, text in zip(features, texts, strict=True)]
    joined, mask = pad_left(rows, embed, 2)
    recorded, seen = outputs["joined.embeds"], outputs["joined.attention"]  # padded for each part by itself
    more = recorded.shape[1] - joined.shape[1]
    assert_close(joined, recorded[:, more:], 1e-6, what="pictures and questions")
    assert_same(mask.tolist(), seen[:, more:].tolist(), "mask of pictures and questions")
    assert not seen[:, :more].any()
    check_texts(cases)
    for task in ("caption", "answer"):
        settings = GenerationSettings(**Lavit.defaults["describe" if task == "caption" else "ask"])
        check_settings(settings, cases[f"{task}_generation_settings"], words)


def check_texts(cases: dict[str, Any]) -> None:
    for case in cases["caption"]:
        results = [case["result"], case["result_with_prompt"]]
        assert_same([cut(case["decoded"], CAPTION_ENDS)] * 2, results, case["decoded"])
    for case in cases["answers"]:
        assert_same(cut(case["decoded"], ANSWER_ENDS), case["result_before_lemmatising"], case["decoded"])
    for question, cleaned in cases["question_processor"]:
        assert_same(QuestionProcessor(QUESTION_WORDS)(question), cleaned, question)
    assert cases["caption"] and cases["answers"] and cases["question_processor"], "the fixture holds no texts"


def cut(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of `ends`, as `AnswerReader` cuts answers."""
    text = text.strip()
    return text[:min((place for place in map(text.find, ends) if place >= 0), default=len(text))]


def check_settings(settings: GenerationSettings, recorded: dict[str, Any], words: ImageVocabulary) -> None:
    assert_same(recorded["suppress_tokens"], [words.boi_id, words.size - 1, words.size - words.boi_id], "no image word")
    ours = {"do_sample": settings.samples, "temperature": settings.temperature, "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens, "min_new_tokens": settings.min_new_tokens,
            "repetition_penalty": settings.repetition_penalty, "length_penalty": settings.length_penalty,
            "num_return_sequences": settings.num_return_sequences, "early_stopping": settings.early_stopping,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for key, value in ours.items():
        if key in recorded:
            assert_same(value, recorded[key], key)
