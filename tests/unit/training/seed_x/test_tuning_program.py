"""The tuning as its users start it: the original's files, flags and scripts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.llm.cli import compose, translate
from seed_multimodal.training.optimizers import schedule
from seed_multimodal.training.seed_x.tuning import AgentModel, TuningTask

APPLICATION = Path(__file__).resolve().parents[4] / "MultiModalLLM"
CONFIGS, NAME = APPLICATION / "configs", "train_seed_x_sft"
SCRIPTS = ("train_seed_x_sft.sh", "train_seed_x_sft_caption.sh", "train_seed_x_sft_edit.sh")


def arguments(parts: ModuleType, home: Path, folder: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    """The original's flags with files of their own, and overrides."""
    config = parts.config_of(home, output, **changes)
    folder.mkdir(exist_ok=True)
    flags = {"llm_model": "model", "agent_model": "agent", "visual_encoder": "visual_encoder",
             "train_dataset": "data"}
    for group in flags.values():
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(config[group]))
    (folder / "words.yaml").write_text(yaml.safe_dump({"_target_": "transformers.LlamaTokenizer.from_pretrained",
                                                       **config["tokenizer"]}))
    given = [word for flag, group in flags.items() for word in (f"--{flag}", str(folder / f"{group}.yaml"))]
    return [*given, "--tokenizer", str(folder / "words.yaml"), "--output_dir", str(output), "--learning_rate", "1e-2",
            "--max_steps", "8", "--batch_size", "50", "--dataloader_num_workers", "0", "--device", "cpu",
            "trainer.timeout_minutes=2", "trainer.report_to=[]", *more]


def test_the_published_recipe_is_the_default() -> None:
    composed = compose(["output_dir=log/x"], CONFIGS, NAME)
    given = TuningTask.read(composed)
    model = given.model
    assert model.path == "pretrained/seed_x/llm" and model.lora is not None and model.lora["r"] == 32
    assert model.train_embeddings and "norm" in model.lora["modules_to_save"]
    assert given.agent == AgentModel(path="pretrained/seed_x/agent/pytorch_model.bin")
    assert given.visual_encoder.path == "pretrained/QwenViT/qwen_vit_G.pt"
    data = given.data
    assert [(source.name, source.decoder, source.weight, source.max_length, source.batch_size, source.cycles)
            for source in data.sources] == [("shareGPT4V", "seed_x.conversation", 0.6, 880, 2, 20),
                                            ("unsplash", "seed_x.caption", 0.2, 260, 8, 12)]
    assert data.sources[0].image_dir == "data/shareGPT4V/data" and not data.packing
    edits = read_data_settings(compose(["output_dir=x", "data=sft_edit"], CONFIGS, NAME)["data"])
    assert [(source.decoder, source.max_length, source.batch_size) for source in edits.sources] == [
        ("seed_x.edit", 320, 6)] * 2
    optim = given.optim
    assert schedule(500, optim, 20000, 2) == pytest.approx(1e-4) and schedule(19999, optim, 20000, 2) < 5.1e-6
    legacy = replace(optim, schedule_per_micro_batch=True)  # the original loop's rate, which rises again
    found = {step: schedule(step, legacy, 20000, 2) / 1e-4 for step in (250, 5000, 10000, 15000, 19999)}
    assert found == pytest.approx({250: 1.0, 5000: 0.544, 10000: 0.05, 15000: 0.544, 19999: 0.9985}, abs=2e-3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_flags_give_the_recipe(script: str) -> None:
    """Those of the shell script, which name the files above."""
    text = (APPLICATION / "scripts" / script).read_text().split("launch ", 1)[1].rsplit('"$@"', 1)[0]
    flags = shlex.split(text.replace("\\\n", " "))[1:]
    given = TuningTask.read(compose(flags, CONFIGS, NAME))
    default = TuningTask.read(compose(["output_dir=log/x"], CONFIGS, NAME))
    assert given.model == default.model and given.agent == default.agent
    assert given.optim == default.optim
    assert given.trainer.max_steps == 20000 and given.trainer.precision == "bf16"
    assert given.trainer.gradient_accumulation_steps == 2
    assert given.deepspeed is not None and given.deepspeed["zero_optimization"]["stage"] == 3
    assert "--batch_size" in translate(flags).ignored


def test_what_the_command_line_leaves_out_is_as_in_the_original() -> None:
    given = TuningTask.read(compose(["--max_steps", "10", "--output_dir", "x"], CONFIGS, NAME))
    optim = given.optim
    assert (optim.learning_rate, optim.weight_decay, optim.adam_beta2, optim.min_lr_ratio) == (5e-5, 0.0, 0.999, 0.01)
    assert given.trainer.precision == "fp32" and given.trainer.save_steps == 10000


def test_flags_that_cannot_be() -> None:
    for flags, sentence in ((["--num_train_epochs", "3"], "use --max_steps"),
                            (["--fsdp_plugin", "x.yaml"], "not supported"),
                            (["--agent_modl", "x.yaml"], "did you mean '--agent_model'")):
        with pytest.raises(ConfigError, match=sentence):
            compose(flags, CONFIGS, NAME)
