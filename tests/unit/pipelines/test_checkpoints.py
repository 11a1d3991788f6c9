"""Checkpoints of a language model's training as systems: their LoRA is merged in memory."""

import shutil
from pathlib import Path

import pytest
from llm_runs import LORA, OPTIM, TRAINER, write_data
from repository import NANO, ROOT
from systems import load
from tiny import read_json, write_json

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError
from seed_multimodal.pipelines.config import SystemConfig

pytestmark = pytest.mark.slow
FOX = str(ROOT / "images" / "fox.png")


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory) -> Path:
    """A system that trainings start from, with texts that describe its own weights."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("base") / "system")
    settings = read_json(folder / "system.json")
    settings |= {"notice": "of the base", "known_words": "known.json"}
    shutil.copy(NANO / "known_words.json", folder / "known.json")
    write_json(folder / "system.json", settings)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory) -> Path:
    """A LoRA after two large steps."""
    from seed_multimodal.training.llm.task import LlmTask

    folder = tmp_path_factory.mktemp("run")
    LlmTask.train(
        {
            "output_dir": str(folder / "out"),
            "tokenizer": {"pretrained_model_name_or_path": str(base / "seed_tokenizer")},
            "model": {"path": str(base / "seed_llama"), "dtype": "fp32", "lora": LORA},
            "data": write_data(folder / "data", 16, 32),
            "trainer": {**TRAINER, "max_steps": 2},
            "optim": {**OPTIM, "learning_rate": 0.3},
        }
    )
    return folder / "out" / "checkpoint-2"


def test_checkpoint_answers_as_trained(base, checkpoint):
    # Its weights are merged as in training/llm/test_model.py.
    system = load(checkpoint)
    assert system.describe(FOX, "what") != load(base).describe(FOX, "what")
    # The base's own notes are not the checkpoint's.
    config = system.config
    assert (config.notice, config.known_words, config.known_images) == ("", None, None)
    assert system.images.can_draw


def test_checkpoint_in_commands(checkpoint, tmp_path, capsys):
    # 8-bit weights cannot be merged, an adapter is no whole system.
    assert main(["describe", FOX, "--model", str(checkpoint)]) == 0
    assert main(f"describe {FOX} --model {checkpoint} --quantization 8bit".split()) == 2
    assert "merge_lora_weights.py" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=str(checkpoint)):
        load(checkpoint).save_pretrained(tmp_path / "saved")


def test_checkpoint_of_peft_names_only_its_base(base, checkpoint, tmp_path):
    # Saved by peft alone, without our record of the system.
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-9")
    (copy / "system.json").unlink()
    assert SystemConfig.find(copy).tokenizer == base / "seed_tokenizer"
    file = copy / "adapter_config.json"
    write_json(file, {**read_json(file), "base_model_name_or_path": "/no"})
    with pytest.raises(ConfigError, match="adapter_config.*/no"):
        load(copy)
