"""SEED-X's tuning and pre-training programs: configurations, flags and scripts of the original."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from repository import ROOT

from seed_multimodal.compat.training_flags import translate
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed_x.train_agent import AgentModel, TuningTask
from seed_multimodal.training.cli import compose
from seed_multimodal.training.run import RunSettings
from seed_multimodal.training.schedules import optim_learning_rate

APPLICATION = ROOT / "MultiModalLLM"
CONFIGS = APPLICATION / "configs"
NAME = "train_seed_x_sft"


def read(*arguments: str, name: str = NAME) -> RunSettings:
    return TuningTask.read(compose(translate(list(arguments)), CONFIGS, name))


def test_tuning_configuration_is_the_published_recipe():
    run = read("output_dir=log/x")
    assert (
        run.model.path == "pretrained/seed_x/llm"
        and run.model.lora is not None
        and run.model.lora["r"] == 32
    )
    assert run.model.train_embeddings and "norm" in run.model.lora["modules_to_save"]
    assert run.agent == AgentModel(path="pretrained/seed_x/agent/pytorch_model.bin")
    assert run.visual_encoder.path == "pretrained/QwenViT/qwen_vit_G.pt" and not run.data.packing
    assert [
        (
            source.name,
            source.decoder,
            source.weight,
            source.max_length,
            source.batch_size,
            source.cycles,
        )
        for source in run.data.sources
    ] == [
        ("shareGPT4V", "seed_x.conversation", 0.6, 880, 2, 20),
        ("unsplash", "seed_x.caption", 0.2, 260, 8, 12),
    ]
    assert run.data.sources[0].image_dir == "data/shareGPT4V/data"
    edits = read_data_settings(
        compose(translate(["output_dir=x", "data=sft_edit"]), CONFIGS, NAME)["data"]
    )
    assert [(source.decoder, source.max_length, source.batch_size) for source in edits.sources] == [
        ("seed_x.edit", 320, 6)
    ] * 2
    assert (
        optim_learning_rate(500, run.optim, 20000, 2) == pytest.approx(1e-4)
        and optim_learning_rate(19999, run.optim, 20000, 2) < 5.1e-6
    )
    legacy = replace(
        run.optim, schedule_per_micro_batch=True
    )  # the original loop's schedule rises again
    rates = {
        step: optim_learning_rate(step, legacy, 20000, 2) / 1e-4
        for step in (250, 5000, 10000, 15000, 19999)
    }
    assert rates == pytest.approx(
        {250: 1.0, 5000: 0.544, 10000: 0.05, 15000: 0.544, 19999: 0.9985}, abs=2e-3
    )


def test_pretraining_configuration_is_the_published_recipe():
    run = read("output_dir=x", name="train_seed_x_pretrain")
    tuning = read("output_dir=x")
    assert run.agent.path is None and tuning.agent.path and run.agent.losses == tuning.agent.losses
    assert run.agent.input_resampler == tuning.agent.input_resampler
    assert (
        run.agent.output_resampler == tuning.agent.output_resampler
        and run.visual_encoder == tuning.visual_encoder
    )
    assert run.model.embedding_init == "mean"  # of the new tokens
    assert (
        run.model.path.endswith("llama-2-13b-chat")
        and run.model.lora == tuning.model.lora is not None
    )
    assert (run.optim.learning_rate, run.optim.lr_scheduler_type) == (1e-4, "cosine")
    assert {source.name for source in run.data.sources} == {
        "laion_coco",
        "sam",
        "unsplash",
        "laion_aesthetics",
        "journeydb",
        "capsfusion",
    }
    for source in run.data.sources:
        assert source.decoder == "seed_x.caption" and source.options["img_first_ratio"] == 0.5
        assert "[INST]" not in source.options["instruction_prompt"] and not source.options.get(
            "add_gen_prompt"
        )


@pytest.mark.parametrize(
    "script", ["train_seed_x_sft.sh", "train_seed_x_sft_caption.sh", "train_seed_x_sft_edit.sh"]
)
def test_flags_of_the_scripts_are_the_published_recipe(script):
    text = (
        (APPLICATION / "scripts" / script).read_text().split("launch ", 1)[1].rsplit('"$@"', 1)[0]
    )
    flags = shlex.split(text.replace("\\\n", " "))[1:]
    run = read(*flags)
    default = read("output_dir=log/x")
    assert (run.model, run.agent, run.optim) == (default.model, default.agent, default.optim)
    assert run.trainer.max_steps == 20000 and run.trainer.precision == "bf16"
    assert run.trainer.gradient_accumulation_steps == 2
    assert run.deepspeed is not None and run.deepspeed["zero_optimization"]["stage"] == 3
    assert "--batch_size" in translate(flags).ignored


def test_flags_default_to_the_originals_values():
    run = read("--max_steps", "10", "--output_dir", "x")
    assert (
        run.optim.learning_rate,
        run.optim.weight_decay,
        run.optim.adam_beta2,
        run.optim.min_lr_ratio,
    ) == (5e-5, 0.0, 0.999, 0.01)
    assert run.trainer.precision == "fp32" and run.trainer.save_steps == 10000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_train_epochs", "3"], "use --max_steps"),
        (
            ["--fsdp_plugin", "x.yaml"],
            "not supported; use ZeRO-3 instead: --deepspeed_plugin "
            "configs/accelerate/deepspeed_stage_3.yaml",
        ),
        (["--agent_modl", "x.yaml"], "did you mean '--agent_model'"),
    ],
)
def test_compose_rejects_unsupported_flags(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(translate(flags), CONFIGS, NAME)
