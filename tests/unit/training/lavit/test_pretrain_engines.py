"""The unified pre-training as a program: killed and resumed, by DistributedDataParallel and DeepSpeed; the recipe."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import warm_python
import yaml
from real_processes import STARTED, free_port, kill_when, nothing_stays_behind  # noqa: F401

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.settings import read_settings
from seed_multimodal.training.lavit.pretrain_app import APPLICATION as PROGRAM
from seed_multimodal.training.lavit.pretrain_settings import read_visual
from seed_multimodal.training.lavit.pretrain_task import PretrainTask
from seed_multimodal.training.llm.app import main
from seed_multimodal.training.llm.compose import compose
from seed_multimodal.training.llm.train import train_llm
from seed_multimodal.training.llm.trainer_settings import read_run
from seed_multimodal.training.optimizers import OptimSettings
from seed_multimodal.weights import load_state_dict

APPLICATION = Path(__file__).resolve().parents[4] / "MultiModalLLM"
STEPS = 4


def overrides(parts: ModuleType, home: Path, output: Path, *more: str) -> list[str]:
    """The published configuration with other groups."""
    config, folder = parts.config_of(home, output, trainer={"max_steps": STEPS}), output.parent / "files"
    folder.mkdir(exist_ok=True)
    given = [f"output_dir={output}", f"tokenizer={config['tokenizer']}"]
    for group in ("model", "visual_encoder", "data", "optim", "trainer"):
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(config[group]))
        given.append(f"{group}={folder / group}.yaml")
    return [*given, *more]


def start(parts: ModuleType, home: Path, output: Path, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    """The published script."""
    port = str(free_port())
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        ["sh", "scripts/train_lavit.sh", *overrides(parts, home, output, *more)], cwd=APPLICATION, text=True,
        start_new_session=True, env={**env, "OMP_NUM_THREADS": "1", "NPROC": str(processes), "MASTER_PORT": port,
                                     "VIRTUAL_ENV": warm_python.ENVIRONMENT},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    STARTED.append(process)
    return process


def run(*given: object, **options: object) -> str:
    process = start(*given, **options)  # type: ignore[arg-type]
    said, complained = process.communicate(timeout=400)
    assert process.returncode == 0, f"{said}\n{complained}"
    return said


@pytest.fixture(scope="module")
def alone(parts: ModuleType, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two micro-batches a step."""
    output = tmp_path_factory.mktemp("alone") / "out"
    train_llm(parts.config_of(home, output, trainer={"max_steps": STEPS, "gradient_accumulation_steps": 2}),
              PretrainTask)
    return output


def close(found: dict[int, float], expected: dict[int, float], within: float = 2e-5) -> bool:
    return found.keys() == expected.keys() and all(abs(found[step] - expected[step]) < within for step in expected)


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_last_bit(parts: ModuleType, home: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    given = ("deepspeed=none", "trainer.save_steps=1", "optim.lr_scheduler_type=constant", "optim.warmup_ratio=0.0",
             "optim.min_lr_ratio=0.0")
    out, whole = tmp_path / "killed" / "out", tmp_path / "whole" / "out"
    for folder in (out, whole):
        folder.parent.mkdir()
    endless = start(parts, home, out, *given, "trainer.max_steps=100000", processes=1)
    log = out / "train.log.jsonl"
    kill_when(lambda: log.is_file() and log.read_text().count("\n") >= 3, endless, 300)
    steps = max(parts.losses(out)) + 2
    for folder in (out, whole):
        assert main(overrides(parts, home, folder, *given, f"trainer.max_steps={steps}"), APPLICATION / "configs",
                    PROGRAM) == 0
        assert ("resumes from" in capsys.readouterr().out) == (folder == out)
    assert parts.losses(out) == parts.losses(whole) and len(parts.losses(out)) == steps
    for name in ("model", "visual_weight"):
        ends = [load_state_dict(one / f"checkpoint-{steps}" / f"{name}.safetensors") for one in (out, whole)]
        assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_are_one(parts: ModuleType, home: Path, alone: Path, tmp_path: Path) -> None:
    said = run(parts, home, tmp_path / "out", "deepspeed=none")
    assert "2 processes on cpu, plain" in said and close(parts.losses(tmp_path / "out"), parts.losses(alone))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
                    reason="DeepSpeed on a CPU needs the package and g++")
@pytest.mark.parametrize("name", ["stage2_bf16", "stage3_offload_bf16"])
def test_zero(name: str, parts: ModuleType, home: Path, alone: Path, tmp_path: Path) -> None:
    """Both rates hold, and the checkpoint is whole; where parameters are split as well, a run resumes, too."""
    out = tmp_path / "out"
    given = (parts, home, out, f"deepspeed=configs/deepspeed/{name}.json", "trainer.save_steps=2",
             "trainer.gradient_checkpointing=true")
    assert "2 processes on cpu, deepspeed" in run(*given)
    whole = parts.losses(out)
    assert close(whole, parts.losses(alone))
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    assert "(step 2)" in run(*given) and parts.losses(out) == whole
    for file in ("model", "visual_weight"):
        own, expected = (load_state_dict(one / f"checkpoint-{STEPS}" / f"{file}.safetensors") for one in (out, alone))
        assert own.keys() == expected.keys()
        assert max(float((value - expected[key]).abs().max()) for key, value in own.items()) < 1e-3


def test_the_recipe_is_read() -> None:
    given = ["output_dir=x", "deepspeed=configs/deepspeed/stage2_bf16.json"]
    settings = read_run(compose(given, APPLICATION / "configs", "train_lavit").config)
    assert settings.visual_encoder is not None and settings.agent is None and settings.deepspeed is not None
    assert read_visual(settings.visual_encoder).selection == "draw"
    optim = read_settings(OptimSettings, settings.optim, "optim")
    assert optim.learning_rate == 1e-5 and set(optim.part_rates.values()) == {1e-4}
    data = read_data_settings(settings.data)
    weights = {source.name: source.weight for source in data.sources}
    assert weights["text"] == 2 * (weights["read"] + weights["drawn"])
    ratios = {source.name: source.options.get("img_first_ratio") for source in data.sources}
    assert (ratios["read"], ratios["drawn"]) == (1.0, 0.0)
