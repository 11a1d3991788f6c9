"""Kind `lavit_generation`: image words that the language model writes, with guidance, and its scores at each call; what
words become: conditions, latents and pictures (lavit_pixels.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavit_pixels import check_pixels
from runner import assert_close, assert_same, read_json, read_tensors

from seed_multimodal.language.lavit import LavitTokenizer, LavitWords
from seed_multimodal.language.lavit_generation import CodeSettings, generate_codes, guided

KIND = "lavit_generation"
# Names of the recorded settings, and of ours.
SETTINGS = {"guidance_scale": "guidance", "use_nucleus_sampling": "do_sample", "max_length": "max_new_tokens",
            "min_length": "min_new_tokens"}


def check(folder: Path) -> None:
    check_pixels(folder)
    config, cases = read_json(folder / "config.json"), read_json(folder / "cases.json")
    weights, outputs = (read_tensors(folder / f"{name}.safetensors") for name in ("weights", "outputs"))
    for name in [name for name in outputs if name.startswith("cfg.scale_")]:
        assert_close(guided(outputs["cfg.cond"], outputs["cfg.uncond"], float(name.removeprefix("cfg.scale_"))),
                     outputs[name], 1e-5, what=name)
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
    settings = CodeSettings(legacy_max_length=legacy, **{SETTINGS[key]: value for key, value in given.items()})
    prompts = [tokenizer.text_ids(prompt) if isinstance(prompt, str) else prompt for prompt in case["prompts"]]
    scores: list[torch.Tensor] = []
    handle = llm.register_forward_hook(lambda module, inputs, output: scores.append(output.logits[:, -1]))
    try:
        written = generate_codes(llm, words, prompts, settings, negative=negative)
    finally:
        handle.remove()
    assert_same(len(scores), case["num_forward_calls"], f"{label}: calls of the language model")
    for call, ours in enumerate(scores):
        if (recorded := outputs.get(f"{label}.call{call}.last_logits")) is not None:
            assert_close(ours[:, rows], recorded, 1e-4, 1e-4, f"{label}: scores of call {call}")
    for picture, recorded in zip(written, case["output"], strict=True):
        assert_same([words.boi_id, *picture.ids], recorded[:len(picture.ids) + 1], f"{label}: words")
        assert picture.ended or len(recorded) == len(picture.ids) + 1, f"{label}: words are missing"
