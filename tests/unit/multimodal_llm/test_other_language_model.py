"""A Qwen 3 with a BPE tokenizer in place of the LLaMA: assembled, used, trained, saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import llm_runs as runs
import pytest
from PIL import Image
from tiny.language import random_llm, write_hub_tokenizer
from tiny.seed import SENTENCES

from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.pipelines.assemble import assemble_system
from seed_multimodal.pipelines.config import SystemConfig

PER_IMAGE = 32
N_CODES = 16
STEPS = 10
SETTINGS = {"image_size": 32, "generation": {"max_new_tokens": 12, "do_sample": False}}
IMAGE = Image.new("RGB", (40, 40), "red")


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory) -> Path:
    """The system: the tiny image tokenizer, the hub tokenizer in its folder, the language model."""
    root = tmp_path_factory.mktemp("other_llm")
    # 1. The tokenizers in one folder.
    words = ("tokenizer.model", "added_tokens.json", "tokenizer_config.json")
    tokenizer_dir = root / "seed_tokenizer"
    ignored = shutil.ignore_patterns(*words, "special_tokens_map.json")
    shutil.copytree(tiny_folder / "seed_tokenizer", tokenizer_dir, ignore=ignored)
    hub = write_hub_tokenizer(root / "hub", SENTENCES)
    tokenizer = HubTokenizer.create(hub, N_CODES, PER_IMAGE)
    tokenizer.save_pretrained(tokenizer_dir)

    # 2. A language model whose tables have rows of padding.
    ids: dict[str, Any] = dict(tokenizer.special_ids)
    random_llm("qwen3", len(tokenizer) + 14, **ids).save_pretrained(root / "llm")
    parts = {"llm": root / "llm", "tokenizer": tokenizer_dir}
    return assemble_system("seed_llama", root / "system", parts, SETTINGS)


@pytest.fixture(scope="module")
def system(folder: Path) -> SeedLlama:
    return SeedLlama.from_pretrained(folder, device="cpu", log=None)


def test_assembled_system_answers_in_the_chat_template(folder: Path, system: SeedLlama):
    assert json.loads((folder / "system.json").read_text())["template"] == "chat"
    prompt = system.prompt_ids([("user", "What is it?")])
    expected = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert system.tokenizer.decode(prompt) == expected
    assert isinstance(system.draw("a red apple", seed=1), Image.Image)

    # Sampled answers hold no rows of padding; the end of the turn ends them.
    messages = [{"role": "user", "content": [IMAGE, "What is it?"]}]
    events = list(system.chat(messages, stream=True, do_sample=True, temperature=3.0, seed=3))
    assert 0 < len(events[-1]["answer"].ids) <= 12
    assert max(events[-1]["answer"].ids) < len(system.tokenizer)
    assert system.stop_sequences("chat") == ()


@pytest.mark.slow
def test_training_and_its_checkpoint(folder: Path, system: SeedLlama, train, tmp_path):
    # 1. Ten steps; the data are in the chat template.
    out = train(
        "run",
        model={"path": str(folder / "llm"), "sizes": None, "lora": {"r": 4}},
        data=runs.write_data(tmp_path / "codes", N_CODES, PER_IMAGE),
        trainer={"max_steps": STEPS},
        tokenizer={"pretrained_model_name_or_path": str(folder / "tokenizer")},
    )
    losses = runs.losses(out)
    assert losses[STEPS] < losses[1]

    # 2. The checkpoint is a system with the other parts of its base.
    checkpoint = out / f"checkpoint-{STEPS}"
    config = SystemConfig.find(checkpoint)
    assert (config.template, config.tokenizer) == ("chat", folder / "tokenizer")
    trained = SeedLlama.from_pretrained(checkpoint, device="cpu", log=None)
    assert trained.llm.config.eos_token_id == system.tokenizer.eos_token_id
    assert trained.describe(IMAGE) != system.describe(IMAGE)
