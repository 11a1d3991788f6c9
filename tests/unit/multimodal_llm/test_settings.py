"""Hydra overrides and the original's command line both become one validated configuration."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import llm_runs as runs
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from repository import APPLICATION
from tiny import read_json, write_json
from yaml_tables import read_tables

from seed_multimodal.compat.training_flags import translate
from seed_multimodal.config import load_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.training.cli import CommandLine, hydra_arguments, main
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.config import LlmTrainerSettings, read_model_settings
from seed_multimodal.training.llm.task import LlmRunSettings, LlmTask
from seed_multimodal.training.zero_engine import resolve_deepspeed_config

CONFIGS = APPLICATION / "configs"


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return runs.write_files(tmp_path)


TABLES = read_tables(__file__)
RECIPES = TABLES["recipes"]


def recipe(run, name) -> dict:
    settings = {**vars(run.optim), **vars(run.trainer)}
    return {key: settings[key] for key in (*RECIPES[name], *TABLES["both"])}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("way", ["script", "groups"])
def test_compose_the_published_recipes(name, way, monkeypatch):
    monkeypatch.chdir(runs.APPLICATION)
    data = f"data=multi_torchdata_{name}"
    arguments = [f"optim={name}", f"trainer={name}", data, "output_dir=out"]
    if way == "script":
        text = Path(f"scripts/train_a100_lora_multi_node_{name}.sh").read_text()
        command = shlex.split(text.replace("\\\n", ""), comments=True)
        arguments = command[command.index("launch") + 2 : -1]  # between the port and "$@"
    run = LlmTask.run_type.read(runs.compose(arguments))
    assert recipe(run, name) == {**RECIPES[name], **TABLES["both"]}
    assert run.optim.name == ("adamw_hf" if way == "script" else "adamw")
    assert run.data.packing and run.data.rows == 6
    if way == "script":
        zero = run.deepspeed["zero_optimization"]
        assert (zero["stage"], "offload_optimizer" in zero) == (2, name == "sft")


def test_compose_later_arguments_win():
    zero = "configs/deepspeed/stage2_bf16.json"
    flags = ["--output_dir", "x", "--max_steps", "30000", "--deepspeed", zero]
    more = ["--max_steps", "7", "optim.learning_rate=0.5", "deepspeed=none"]
    config = runs.compose([*flags, *more])
    assert config["trainer"]["max_steps"] == 7
    assert config["optim"]["learning_rate"] == 0.5
    assert config.get("deepspeed") is None


@pytest.mark.parametrize("row", TABLES["flags"], ids=str)
def test_translate_flags_of_the_original(row):
    translated = translate(row["arguments"].split()).arguments
    assert [override.removeprefix("++") for override in translated] == row["overrides"]


@pytest.mark.parametrize("group", ["model", "data"])
def test_main_with_a_target_that_is_not_allowed(group, files, tmp_path, capsys):
    # A configuration of a stranger must not start a program.
    made = tmp_path / "made"
    files[group].write_text(f"_target_: os.system\ncommand: touch {made}\n")
    assert main("train", CONFIGS, runs.overrides(files, tmp_path / "out")) == 2
    assert "os.system" in capsys.readouterr().err
    assert not made.exists()


def test_read_settings_of_the_files_of_every_group():
    for file in (CONFIGS / "trainer").glob("*.yaml"):
        read_settings(LlmTrainerSettings, yaml.safe_load(file.read_text()), "trainer")
    for file in (CONFIGS / "optim").glob("*.yaml"):
        read_settings(OptimSettings, yaml.safe_load(file.read_text()), "optim")


def filled(file, **trainer) -> tuple[dict, list[str]]:
    """A DeepSpeed file, filled for eight processes, and the remarks about it."""
    settings = read_settings(LlmTrainerSettings, trainer, "trainer")
    config = read_json(file)
    return resolve_deepspeed_config(config, settings, world=8, rows=3, hidden_size=64)


@pytest.mark.parametrize("case", TABLES["contradictions"], ids=str)
def test_fill_config_that_contradicts_the_trainer(case):
    with pytest.raises(ConfigError, match=case["named"]):
        filled(CONFIGS / "deepspeed" / "stage2_bf16_mefft.json", **case["trainer"])


@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.stem
)
def test_fill_config_of_a_deepspeed_file(file):
    # The names say stage, precision and offloading; nothing is left to fill.
    precision = "bf16" if "bf16" in file.stem else "fp16"
    micro_steps = 1 if "mefft" in file.stem else 4
    config, _ = filled(file, precision=precision, gradient_accumulation_steps=micro_steps)
    assert '"auto"' not in json.dumps(config)
    assert config[precision]["enabled"] is True
    micro_batch = config["train_micro_batch_size_per_gpu"]
    assert config["train_batch_size"] == 8 * micro_batch * micro_steps
    zero = config["zero_optimization"]
    assert f"stage{zero['stage']}" in file.stem
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    assert (offload == "cpu") == ("offload" in file.stem)


@pytest.mark.parametrize("precision, torch_dtype, used", TABLES["dtypes"])
def test_dtype_of_the_base_is_that_of_the_run_or_the_file(precision, torch_dtype, used, files):
    model = {
        "_target_": "src.model.peft_model.get_peft_model_with_resize_embedding",
        "model": {**TABLES["base"], **({"torch_dtype": torch_dtype} if torch_dtype else {})},
        "peft_config": LORA,
    }
    files["model"].write_text(yaml.safe_dump(model))
    arguments = runs.overrides(files, Path("out"), f"trainer.precision={precision}")
    run = LlmTask.run_type.read(runs.compose(arguments))
    # fp16 is allowed on a GPU; nothing is put there.
    task = LlmTask(run, ProcessGroup(), torch.device("cuda"))
    assert task.run.model.dtype == used


LORA = {"_target_": "peft.LoraConfig", "r": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("row", TABLES["models"], ids=str)
def test_read_model_settings_of_the_originals(row):
    file, config, expected = row.values()
    if file:
        published = load_yaml(CONFIGS / "model" / f"{file}.yaml")
        config = {**OmegaConf.to_container(published, resolve=True), **config}
    settings = read_model_settings(config)
    assert {key: getattr(settings, key) for key in expected} == expected
    if file.endswith("lora"):
        assert {key: settings.lora[key] for key in TABLES["lora"]} == TABLES["lora"]


@pytest.mark.parametrize("row", TABLES["mistakes"], ids=str)
def test_read_model_settings_with_a_mistake(row):
    with pytest.raises(ConfigError, match=row["named"]):
        read_model_settings(row["config"])


@dataclass(kw_only=True)
class SampledRunSettings(LlmRunSettings):
    sampling: OptimSettings | None = None


def test_optional_group_is_checked(files):
    # It was handed to the task as it stood.
    config = runs.compose(runs.overrides(files, "x"))
    assert SampledRunSettings.read(config).sampling is None
    config["sampling"] = {"learning_rate": 0.5}
    assert SampledRunSettings.read(config).sampling.learning_rate == 0.5
    config["sampling"] = {"learning_rat": 0.5}
    with pytest.raises(ConfigError, match="sampling: .*did you mean 'learning_rate'"):
        SampledRunSettings.read(config)


def test_groups_are_those_of_the_configuration(tmp_path):
    # A file of a group that another package adds is chosen as those of ours.
    file = tmp_path / "train.yaml"
    file.write_text("defaults: [{clm_models@sampling: hot}, {model: small}]")
    (tmp_path / "clm_models").mkdir()
    (tmp_path / "clm_models" / "cold.yaml").write_text("t: 0")
    arguments = ["sampling=cold", "sampling.t=1", "--cfg", "model=none"]
    options, overrides, _ = hydra_arguments(CommandLine(arguments), file)
    assert (options, overrides) == (
        ["--cfg"], ["++sampling.t=1", "clm_models@sampling=cold", "~model"]
    )  # fmt: skip


@pytest.mark.parametrize("row", TABLES["templates"], ids=str)
def test_read_gives_the_sources_the_template_of_the_model(row, tmp_path, files):
    # That of the 7B or 13B by its width, unless the model, the data or the source names one;
    # captions have none.
    write_json(tmp_path / "config.json", {"hidden_size": row["width"]})
    config = runs.compose(runs.overrides(files, "x"))
    config["model"] = {"path": str(tmp_path), "template": row["model"]}
    config["data"] |= row["data"]
    config["data"]["sources"][1]["options"] = row["source"]
    sources = LlmTask.run_type.read(config).data.sources
    assert [source.options.get("template") for source in sources] == [None, row["expected"]]
