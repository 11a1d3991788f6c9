"""Checkpoints of a language model's training as systems: their LoRA is merged in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from llm_runs import LORA, OPTIM, TRAINER, write_data
from repository import ROOT
from tensors import equal

from seed_multimodal.cli.main import main
from seed_multimodal.compat.seed_llama_yaml import system_from_configs
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.lora import load_llm_or_adapter, merge_adapter
from seed_multimodal.language.messages import user_message
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.training.llm.task import LlmTask

pytestmark = pytest.mark.slow
FOX = str(ROOT / "images" / "fox.png")
STEPS = 2


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory) -> Path:
    """A system that trainings start from, with texts that describe its own weights."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("base") / "system")
    settings = json.loads((folder / "system.json").read_text())
    (folder / "known.json").write_text("[]")
    (folder / "system.json").write_text(
        json.dumps({**settings, "notice": "of the base", "known_words": "known.json"})
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory) -> Path:
    """A LoRA after two large steps."""
    folder = tmp_path_factory.mktemp("run")
    LlmTask.train(
        {
            "output_dir": str(folder / "out"),
            "tokenizer": {"pretrained_model_name_or_path": str(base / "seed_tokenizer")},
            "model": {"path": str(base / "seed_llama"), "dtype": "fp32", "lora": LORA},
            "data": write_data(folder / "data", 16, 32),
            "trainer": {**TRAINER, "max_steps": STEPS},
            "optim": {**OPTIM, "learning_rate": 0.3},
        }
    )
    return folder / "out" / f"checkpoint-{STEPS}"


def answers(system: SeedLlama) -> list[list[int]]:
    """Ids of the answers to three requests."""
    prompts = system.build_prompts(
        [user_message([FOX, text]) for text in ("what", "a red apple", "draw")], "chat"
    )
    return system.generate(prompts, system.settings("chat", max_new_tokens=20), "chat")


def test_checkpoint_answers_as_the_merged_model(base: Path, checkpoint: Path, tmp_path):
    merged = shutil.copytree(base, tmp_path / "merged", ignore=shutil.ignore_patterns("seed_llama"))
    merge_adapter(base / "seed_llama", checkpoint, merged / "seed_llama")
    expected = answers(SeedLlama.from_pretrained(merged, device="cpu", log=None))
    system = MultimodalSystem.from_pretrained(checkpoint, device="cpu", log=None)
    assert answers(system) == expected
    assert answers(SeedLlama.from_pretrained(base, device="cpu", log=None)) != expected
    assert system.images.can_draw and (system.config.notice, system.config.known_words) == (
        "",
        None,
    )
    served = system_from_configs(
        model=checkpoint,
        tokenizer=base / "seed_tokenizer",
        llm_device="cpu",
        tokenizer_device="cpu",
    )
    trained = system.llm.state_dict()
    assert equal(served.llm.state_dict(), trained)
    assert served.config.name == checkpoint.name


def test_checkpoint_in_commands(checkpoint: Path, tmp_path, capsys):
    assert main(["describe", FOX, "--model", str(checkpoint)]) == 0
    assert main(f"describe {FOX} --model {checkpoint} --quantization 8bit".split()) == 2
    assert (
        "cannot be merged into 8bit weights; src/tools/merge_lora_weights.py"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="is an adapter; merge it"):
        MultimodalSystem.from_pretrained(checkpoint, device="cpu", log=None).save_pretrained(
            tmp_path / "saved"
        )


def test_checkpoint_of_peft_names_only_its_base(base: Path, checkpoint: Path, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-9")
    (copy / "base.json").unlink()
    assert SystemConfig.find(copy).tokenizer == base / "seed_tokenizer"
    record = json.loads((copy / "adapter_config.json").read_text())
    for name, message in (
        ("/no/such/base", "'/no/such/base', no base model on this disk"),
        (None, "name there the"),
    ):
        (copy / "adapter_config.json").write_text(
            json.dumps({**record, "base_model_name_or_path": name})
        )
        with pytest.raises((CheckpointError, ConfigError), match=message):
            SystemConfig.find(copy)
            load_llm_or_adapter(copy)


def test_checkpoint_with_a_wrong_record(checkpoint: Path, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for text, message in (
        ('{"system": "seed_y"}', "base.json: system must be one of"),
        ('{"system": "lavit", "lm": "x"}', r"base.json: unknown key 'lm'"),
        ('{"system": "lavit", "llm": 3}', "base.json: llm"),
    ):
        (copy / "base.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            SystemConfig.find(copy)
