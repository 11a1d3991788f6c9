"""SEED-X's tuning and pre-training programs: configurations, flags and scripts of the original."""

import shlex

import llm_runs
import pytest
from repository import APPLICATION

from seed_multimodal.recipes.seed_x.train_agent import AgentModel, TuningTask
from seed_multimodal.training.hydra_task import RunSettings
from seed_multimodal.training.schedules import optim_learning_rate


def read(*arguments: str) -> RunSettings:
    return TuningTask.run_type.read(llm_runs.compose(arguments, name="train_seed_x_sft"))


def test_tuning_configuration_is_the_published_recipe():
    # A changed default would make other models than the paper's.
    run = read("output_dir=log/x")
    assert run.model.path == "pretrained/seed_x/llm"
    assert run.model.lora is not None and run.model.lora["r"] == 32
    assert run.agent == AgentModel(path="pretrained/seed_x/agent/pytorch_model.bin")
    values = [
        (source.decoder, source.weight, source.max_length, source.batch_size, source.cycles)
        for source in run.data.sources
    ]
    assert values == [
        ("seed_x.conversation", 0.6, 880, 2, 20),
        ("seed_x.caption", 0.2, 260, 8, 12),
    ]
    rates = [optim_learning_rate(step, run.optim, 20000, 2) for step in (500, 19999)]
    assert rates == pytest.approx([1e-4, 5e-6], rel=0.02)


@pytest.mark.parametrize(
    "script", ["train_seed_x_sft.sh", "train_seed_x_sft_caption.sh", "train_seed_x_sft_edit.sh"]
)
def test_flags_of_the_scripts_are_the_published_recipe(script):
    # The originals' command lines and our configuration are one recipe.
    text = (APPLICATION / "scripts" / script).read_text()
    command = text.split("launch ", 1)[1].rsplit('"$@"', 1)[0]
    run = read(*shlex.split(command.replace("\\\n", " "))[1:])
    default = read("output_dir=log/x")
    assert (run.model, run.agent, run.optim) == (default.model, default.agent, default.optim)
    assert run.trainer.gradient_accumulation_steps == 2
    assert run.deepspeed is not None and run.deepspeed["zero_optimization"]["stage"] == 3


def test_flags_default_to_the_originals_values():
    # As those of the original's argument parser, not as ours.
    run = read("--max_steps", "10", "--output_dir", "x")
    names = ("learning_rate", "weight_decay", "adam_beta2", "min_lr_ratio")
    assert [getattr(run.optim, name) for name in names] == [5e-5, 0.0, 0.999, 0.01]
    assert (run.trainer.precision, run.trainer.save_steps) == ("fp32", 10000)
