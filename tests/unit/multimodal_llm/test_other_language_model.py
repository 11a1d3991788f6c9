"""A Qwen 3 with a BPE tokenizer in place of the LLaMA: assembled, used, trained, saved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import llm_runs as runs
import pytest
import yaml
from hub_tokenizers import write_hub_tokenizer
from PIL import Image
from tiny_llms import random_llm
from tiny_system import SENTENCES

from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.decoders.chat import Chat
from seed_multimodal.data.decoders.seed_llama_sft import TextConversationTuned
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.lora import merge_adapter
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.pipelines.assemble import assemble_system
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.training.cli import parse, run

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


def test_assemble_chooses_the_chat_template(folder: Path, system: SeedLlama):
    assert json.loads((folder / "system.json").read_text())["template"] == "chat"
    prompt = system.prompt_ids([("user", "What is it?")])
    expected = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert system.tokenizer.decode(prompt) == expected


def test_answers_and_drawings(system: SeedLlama):
    text = system.describe(IMAGE)
    assert text == system.describe(IMAGE)
    assert system.ask([IMAGE, IMAGE], "What is it?", short=False)
    drawn = system.draw("a red apple", seed=1)
    assert isinstance(drawn, Image.Image)

    # A conversation, streamed; sampled answers hold no rows of padding.
    messages = [
        {"role": "system", "content": ["Be short."]},
        {"role": "user", "content": [IMAGE, "What is it?"]},
    ]
    events = list(system.chat(messages, stream=True, do_sample=True, temperature=3.0, seed=3))
    answer = events[-1]["answer"]
    assert events[-1]["type"] == "done"
    assert 0 < len(answer.ids) <= 12
    assert max(answer.ids) < len(system.tokenizer)
    # The end of the turn ends the answer.
    assert system.stop_sequences("chat") == ()


def test_training_data_equal_prompts(system: SeedLlama):
    """Learned are the answers, each with the token that ends its turn."""
    tokenizer = system.tokenizer
    codes = [index % N_CODES for index in range(PER_IMAGE)]
    contents = [[{"codes": codes}, " What is it?"], ["A cat. <|im_end|>"], ["Where?"], ["Here."]]
    roles = ("user", "assistant", "user", "assistant")
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    decoder = Chat(tokenizer, {"template": "chat"})
    sequence = decoder.decode({"messages": messages}, SeededRandom(0))

    # 1. The ids are those of the prompt of the last turn, and its answer.
    turns = [("user", [codes, " What is it?"]), ("assistant", contents[1]), ("user", "Where?")]
    prompt = system.prompt_ids(turns)
    answer = [*tokenizer.encode("Here."), tokenizer.eos_token_id]
    assert list(sequence.ids) == [*prompt, *answer]

    # 2. The labels.
    learned = [label for label in sequence.labels if label != IGNORE_INDEX]
    first = [*tokenizer.encode_parts(contents[1]), tokenizer.eos_token_id]
    assert learned == [*first, *answer]


def test_tuning_decoders_write_the_chat_template(system: SeedLlama):
    texts = ["What is it?", "A cat.", "Where?", "Here."]
    options = {"template": "chat", "system_message": "Be short."}
    sequence = TextConversationTuned(system.tokenizer, options).decode(
        {"data": texts}, SeededRandom(0)
    )
    turns = list(zip(("user", "assistant", "user"), texts, strict=False))
    prompt = system.prompt_ids(turns, "Be short.")
    answer = [*system.tokenizer.encode("Here."), system.tokenizer.eos_token_id]
    assert list(sequence.ids) == [*prompt, *answer]


def test_save_pretrained(system: SeedLlama, tmp_path):
    saved = system.save_pretrained(tmp_path / "saved")
    loaded = SeedLlama.from_pretrained(saved, device="cpu", log=None)
    assert loaded.describe(IMAGE) == system.describe(IMAGE)
    assert loaded.tokenizer.eos_token_ids == system.tokenizer.eos_token_ids


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 8}], ids=["full", "lora"])
def test_training_and_its_checkpoint(folder: Path, system: SeedLlama, lora, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # 1. Ten steps; the data are in the chat template.
    contents = {
        "model": {"path": str(folder / "llm"), "dtype": "fp32", "lora": lora},
        "data": runs.write_data(tmp_path / "data", N_CODES, PER_IMAGE),
        "trainer": {**runs.TRAINER, "max_steps": STEPS, "eval_steps": 5},
        "optim": runs.OPTIM,
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
    }
    files = {}
    for group, content in contents.items():
        files[group] = tmp_path / f"{group}.yaml"
        files[group].write_text(yaml.safe_dump(content))
    out = tmp_path / "run"
    run("train", runs.APPLICATION / "configs", parse(runs.overrides(files, out)))
    losses = runs.losses(out)
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses.values()))
    assert losses[STEPS] < losses[1]

    # 2. The checkpoint is a system with the other parts of its base.
    checkpoint = next(out.glob(f"checkpoint-{STEPS}"))
    config = SystemConfig.find(checkpoint)
    assert config.template == "chat"
    assert config.tokenizer == folder / "tokenizer"
    trained = SeedLlama.from_pretrained(checkpoint, device="cpu", log=None)
    assert trained.llm.config.eos_token_id == system.tokenizer.eos_token_id
    answer = trained.describe(IMAGE)
    assert answer != system.describe(IMAGE)
    if lora is not None:
        merge_adapter(folder / "llm", checkpoint, tmp_path / "merged", tokenizer=system.tokenizer)
        merged = SystemConfig.find(folder, llm=tmp_path / "merged")
        assert SeedLlama.from_pretrained(merged, device="cpu", log=None).describe(IMAGE) == answer
