"""`seed init --size tiny`: from random parts to a system that answers, draws and is served."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from llm_runs import environment, losses
from real_processes import nothing_stays_behind, processes_with, run_checked, wait_until
from repository import FOX
from systems import load

from seed_multimodal.cli.main import main

__all__ = ["nothing_stays_behind"]
N_CODES = 8
CODEBOOK = 64
SIZE = (64, 64)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The folder, after all steps."""
    out = tmp_path_factory.mktemp("recipe") / "mine"
    flags = f"--size tiny --codes {N_CODES} --codebook {CODEBOOK}"
    assert main(["init", *flags.split(), str(out)]) == 0
    done = run_checked(["bash", str(out / "run.sh")], timeout=400, env=environment())
    assert done.stdout.count("Next: ") == 1  # at the end
    return out


pytestmark = [pytest.mark.process, pytest.mark.nightly, pytest.mark.timeout(500)]


@pytest.mark.parametrize("run", ["stage1", "stage2", "pretrain", "sft", "decoder"])
def test_training_of_the_recipe_learns(recipe, run):
    log = f"{run if run.startswith('stage') else 'train'}.log.jsonl"
    values = [*losses(recipe / run, log).values()]
    assert values[-1] < 0.98 * values[0]


def test_system_of_the_recipe_reads_and_draws(recipe):
    seed = load(recipe / "system")

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


def test_longer_trainings_reach_the_system(recipe):
    # Only the two longer ones resume, and what is made of them; nothing else runs again.
    script = recipe / "run.sh"
    text = script.read_text().replace("SFT_STEPS=50", "SFT_STEPS=51")
    script.write_text(text.replace("DECODER_STEPS=80", "DECODER_STEPS=81"))
    weights = (recipe / "system/llm/model.safetensors").read_bytes()
    done = run_checked(["bash", str(script)], env=environment())
    assert done.stderr.count("finished (") == 7
    steps = re.findall(r"(?m)^== (\w+)$", done.stderr)
    assert steps == ["sft", "merge", "decoder", "system"]
    assert done.stdout.count("resumes from") == 2
    assert (recipe / "system/llm/model.safetensors").read_bytes() != weights


def test_stopped_script_stops_its_training(recipe, nothing_stays_behind):
    # Ctrl-C of the script loses no training: SIGTERM saves stage 2, the same command resumes it.
    script = recipe / "run.sh"
    script.write_text(script.read_text().replace("STAGE2_EPOCHS=2", "STAGE2_EPOCHS=200"))
    log = recipe / "stage2/stage2.log.jsonl"
    for _ in range(2):
        size = log.stat().st_size
        process = subprocess.Popen(
            ["bash", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        nothing_stays_behind.append(process)
        wait_until(lambda size=size: log.stat().st_size > size, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 143, output
        assert "== stage1: finished" in output
        assert re.search(
            r"\] resumes from .*stopped by SIGTERM or Ctrl-C after step", output, re.DOTALL
        )
        assert not processes_with(str(recipe))
