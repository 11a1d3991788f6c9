"""Kind `lavit_generation`: image words that the language model writes, with guidance, and its scores at each call; what
words become: conditions, latents and pictures (lavit_pixels.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavit_pixels import check_pixels
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.language.generation import GenerationSettings, Prompt, generate
from seed_multimodal.lavit.pipeline import DRAWING
from seed_multimodal.lavit.processing import LavitTokenizer, LavitWords

KIND = "lavit_generation"
# Names of the recorded settings, and of ours.
SETTINGS = {"guidance_scale": "guidance", "use_nucleus_sampling": "do_sample", "max_length": "max_new_tokens",
            "min_length": "min_new_tokens"}


def check(folder: Path) -> None:
    check_pixels(folder)
    config, cases = read_json(folder / "config.json"), read_json(folder / "cases.json")
    weights, outputs = (read_tensors(folder / f"{name}.safetensors") for name in ("weights", "outputs"))
    tokenizer = LavitTokenizer.from_pretrained(folder / "tokenizer", LavitWords(n_codes=config["visual_codes"]))
    llm = language_model(config, weights)
    assert cases["cases"], "the fixture holds no generation"
    for case in cases["cases"]:
        check_case(case, llm, tokenizer, weights["llm.row_ids"], outputs)


def language_model(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The recorded model; rows of words that are never read nor written are zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(**config["llm"])).eval()
    state = {name.removeprefix("llm."): value for name, value in weights.items() if name.startswith("llm.model.")}
    for name, rows in (("model.embed_tokens", "embed"), ("lm_head", "lm_head")):
        table = torch.zeros(config["llm"]["vocab_size"], config["llm"]["hidden_size"])
        table[weights["llm.row_ids"]] = weights[f"llm.{rows}_rows"]
        state[f"{name}.weight"] = table
    llm.load_state_dict(state)
    return llm


def check_case(case: dict[str, Any], llm: Any, tokenizer: LavitTokenizer, rows: torch.Tensor,
               outputs: dict[str, torch.Tensor]) -> None:
    label, given, words = case["label"], dict(case["kwargs"]), tokenizer.vocabulary
    legacy, negative = given.pop("is_token_prompt", False), given.pop("uncond_input_ids", None)
    prompts = [tokenizer.text_ids(prompt) if isinstance(prompt, str) else prompt for prompt in case["prompts"]]
    given = {**DRAWING, "guidance": 4.0, **{SETTINGS[key]: value for key, value in given.items()}}
    if legacy:  # the original program gave prompts of images as many new words as the longest has
        given["max_new_tokens"] = max(map(len, prompts))
    settings = GenerationSettings(force_image=True, **given)
    scores: list[torch.Tensor] = []
    handle = llm.register_forward_hook(lambda module, inputs, output: scores.append(output.logits[:, -1]))
    try:
        against = [None] * len(prompts) if negative is None else negative
        against = against * len(prompts) if len(against) == 1 else against
        asked = [Prompt(ids, negative=row) for ids, row in zip(prompts, against, strict=True)]
        written = generate(llm, tokenizer, asked, settings, ends=[words.eoi_id])
    finally:
        handle.remove()
    assert_same(len(scores), case["num_forward_calls"], f"{label}: calls of the language model")
    for call, ours in enumerate(scores):
        if (recorded := outputs.get(f"{label}.call{call}.last_logits")) is not None:
            assert_close(ours[:, rows], recorded, 1e-4, 1e-4, f"{label}: scores of call {call}")
    for ids, recorded in zip(written, case["output"], strict=True):
        assert_same(ids, recorded[:len(ids)], f"{label}: words")
        assert ids[-1] == words.eoi_id or len(recorded) == len(ids), f"{label}: words are missing"
