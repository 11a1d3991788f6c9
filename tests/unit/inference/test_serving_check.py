"""`seed check-llm`: what a completion server reads of a language model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny.language import random_llm, write_hub_tokenizer
from transformers import AutoTokenizer

from seed_multimodal.cli.main import main
from seed_multimodal.inference.serving_check import check_llm
from seed_multimodal.language.hub_tokenizer import HubTokenizer

NANO = ROOT / "pretrained" / "nano"
TOKENIZER = NANO / "seed_tokenizer"


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    folder = tmp_path / "seed_llama"
    shutil.copytree(NANO / "seed_llama", folder)
    return folder


def problems(llm: Path) -> dict[str, str]:
    findings = check_llm(llm, TOKENIZER, TOKENIZER)
    return {finding.what: finding.problem for finding in findings if finding.problem}


def test_the_command_prints_how_to_serve_nano(capsys):
    assert main(["check-llm", "--model", str(NANO)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["config", "vocabulary"]
    assert lines[-1].startswith(f"Next: vllm serve {NANO}/seed_llama --tokenizer {NANO}/")


def test_a_head_that_would_not_be_read(llm):
    weights = load_file(llm / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, llm / "model.safetensors")
    assert list(problems(llm)) == ["head"]


def test_missing_tensors(llm):
    weights = load_file(llm / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, llm / "model.safetensors")
    assert "1 tensors are missing from the file: 'model.norm.weight'" in problems(llm)["weights"]


def test_image_tokens_of_a_hub_tokenizer_are_written_for_the_server(tmp_path, capsys):
    """vLLM refuses ids beyond its tokenizer's length, and these are in a file of ours."""
    hub = write_hub_tokenizer(tmp_path / "hub", ["a fox in a meadow"])
    tokenizer = HubTokenizer.create(hub, n_codes=16, tokens_per_image=4)
    tokenizer.save_pretrained(tmp_path / "system" / "seed_tokenizer")
    llm = random_llm("qwen3", tokenizer.vocabulary.size, tie_word_embeddings=True)
    llm.save_pretrained(tmp_path / "system" / "llm")
    (tmp_path / "system" / "system.json").write_text(
        json.dumps({"llm": "llm", "tokenizer": "seed_tokenizer"})
    )
    command = ["check-llm", "--model", str(tmp_path / "system")]
    assert main(command) == 1
    assert "tokenizer   PROBLEM  transformers finds no <img_00000>" in capsys.readouterr().out
    served = tmp_path / "served"
    assert main([*command, "--tokenizer-out", str(served)]) == 0
    assert f"--tokenizer {served} " in capsys.readouterr().out
    plain = AutoTokenizer.from_pretrained(served)
    assert len(plain) == tokenizer.vocabulary.size
    assert plain.decode(tokenizer.encode("a fox <img></img>")) == "a fox <img></img>"


def test_ends_of_the_original_files_are_a_note(llm):
    file = llm / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 1}))
    assert problems(llm) == {}
    ends = check_llm(llm, TOKENIZER, TOKENIZER)[-1]
    assert ends.note.startswith("generation_config.json has 1, the tokenizer [2]")


def test_a_class_that_a_server_does_not_have(llm):
    values = json.loads((llm / "config.json").read_text())
    values["architectures"] = ["SeedLlamaForCausalLM"]
    (llm / "config.json").write_text(json.dumps(values))
    assert "SeedLlamaForCausalLM is no language model" in problems(llm)["config"]
