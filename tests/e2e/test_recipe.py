"""`seed init --size tiny`: from random parts to a system that answers, draws and is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import torch
from lavis_runs import environment
from llm_runs import losses
from real_processes import run_process
from repository import FOX
from served import Running, body, read

from seed_multimodal import SeedLlama
from seed_multimodal.cli.main import main

N_CODES = 8
CODEBOOK = 64
SIZE = (64, 64)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The folder, after all steps."""
    out = tmp_path_factory.mktemp("recipe") / "mine"
    flags = f"--size tiny --codes {N_CODES} --codebook {CODEBOOK}"
    assert main(["init", *flags.split(), str(out)]) == 0
    done = run_process(["bash", str(out / "run.sh")], timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def seed(recipe) -> SeedLlama:
    return SeedLlama.from_pretrained(recipe / "system", device="cpu", log=None)


pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.mark.parametrize("run", ["stage1", "stage2", "pretrain", "sft", "decoder"])
def test_training_of_the_recipe_learns(recipe, run):
    log = f"{run if run.startswith('stage') else 'train'}.log.jsonl"
    values = [*losses(recipe / run, log).values()]
    assert values[-1] < 0.98 * values[0]


def test_system_of_the_recipe_reads_and_draws(seed):
    # 1. Codes differ between images, and so do the drawings of codes.
    codes = seed.tokenize([FOX, FOX.with_name("whale.png")])
    assert codes.shape == (2, N_CODES)
    assert not torch.equal(codes[0], codes[1])
    first, second = seed.images.draw(codes, seeds=[0, 0], num_inference_steps=2)
    assert first.size == SIZE
    assert first.tobytes() != second.tobytes()

    # 2. Descriptions, drawings and conversations, in the chat template of the tokenizer.
    assert seed.config.template == "chat"
    assert seed.describe(FOX, max_new_tokens=8)
    assert seed.draw("a fox", num_inference_steps=2).size == SIZE
    talk = [{"role": "user", "content": [FOX, "What is it?"]}]
    assert seed.chat(talk, max_new_tokens=8).text


def test_language_model_of_the_recipe_opens_in_transformers(recipe, seed):
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(recipe / "system" / "llm")
    assert llm.config.model_type == "qwen3"
    ids = torch.tensor([seed.tokenizer.encode("a fox")])
    with torch.no_grad():
        expected = seed.llm(ids, use_cache=False).logits
        torch.testing.assert_close(llm(ids).logits, expected)


def test_server_of_the_recipe(seed):
    server = Running(seed)
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    question = body(template.format("Draw a fox."), max_new_tokens=8, force_boi=True)
    answer = requests.post(server.address, json=question, timeout=60).json()
    assert read(answer["images"][0]).size == SIZE


def test_gguf_of_the_recipe(recipe, tmp_path, seed):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "llm.gguf"
    model = str(recipe / "system")
    assert main(["export-gguf", "--model", model, "--quant", "f16", "--out", str(out)]) == 0
    fields = gguf.GGUFReader(out).fields
    assert fields["general.architecture"].contents() == "qwen3"
    assert len(fields["tokenizer.ggml.tokens"].contents()) >= len(seed.tokenizer)


def test_finished_recipe_runs_nothing_again(recipe):
    done = run_process(["bash", str(recipe / "run.sh")], env=environment())
    assert done.returncode == 0
    assert done.stderr.count("finished (") == 11
