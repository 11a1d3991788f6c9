"""The tuning in two processes, by DistributedDataParallel and DeepSpeed: one process's numbers, also where one of them
has no picture in its batch; a kill; what DeepSpeed's own script makes of a checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import warm_python
import yaml
from real_processes import STARTED, children, nothing_stays_behind  # noqa: F401

from seed_multimodal.language.agent_weights import load_agent
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.train import train_llm
from seed_multimodal.training.llm.trainer_settings import read_run
from seed_multimodal.training.seed_x.tuning_task import TuningTask
from seed_multimodal.weights import load_state_dict

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]
APPLICATION = Path(__file__).resolve().parents[4] / "MultiModalLLM"
STEPS = 4


def configured(parts: ModuleType, home: Path, output: Path, **trainer: Any) -> dict[str, Any]:
    """A LoRA without dropout (each process draws its own); a third of the batches hold no picture at all."""
    words = home / "words.jsonl"
    words.write_text("".join(json.dumps({"data": [f"Make it {name}.", f"It is {name}."]}) + "\n" for name in
                             parts.COLOURS))
    data = parts.data_of(home, seed=4)
    data["sources"].append({**data["sources"][0], "name": "words", "files": str(words), "weight": 2.0})
    return parts.config_of(home, output, data=data, lora=True, model={"lora": {**parts.LORA, "lora_dropout": 0.0}},
                           trainer={"max_steps": STEPS, **trainer})


def start(parts: ModuleType, home: Path, folder: Path, output: Path, *more: str,
          environment: str = warm_python.ENVIRONMENT) -> subprocess.Popen[str]:
    """The published script with two processes and other groups."""
    config = configured(parts, home, output)
    folder.mkdir(exist_ok=True)
    given = [f"output_dir={output}", f"tokenizer={config['tokenizer']}"]
    for group in ("model", "agent", "visual_encoder", "data", "optim", "trainer"):
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(config[group]))
        given.append(f"{group}={folder / group}.yaml")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        ["sh", "scripts/train_seed_x_sft.sh", *given, *more], cwd=APPLICATION, text=True, start_new_session=True,
        env={**env, "OMP_NUM_THREADS": "1", "NPROC": "2", "MASTER_PORT": port,
             "VIRTUAL_ENV": environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    STARTED.append(process)
    return process


def run(*given: Any) -> str:
    process = start(*given)
    said, complained = process.communicate(timeout=400)
    assert process.returncode == 0, f"{said}\n{complained}"
    return said


@pytest.fixture(scope="module")
def alone(parts: ModuleType, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two micro-batches a step."""
    output = tmp_path_factory.mktemp("alone") / "out"
    record = train_llm(configured(parts, home, output, gradient_accumulation_steps=2), TuningTask)
    assert record["data"]["sources"]["words"]["sequences"] and record["data"]["sources"]["edit"]["sequences"]
    return output


def close(found: dict[int, float], expected: dict[int, float], within: float = 2e-5) -> bool:
    return found.keys() == expected.keys() and all(abs(found[step] - expected[step]) < within for step in expected)


def test_two_processes_are_one_and_resume_after_a_kill(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """One of them is killed while both work; the same command goes on, with one process's numbers throughout."""
    out, constant = tmp_path / "two", {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "min_lr_ratio": 0.0}
    given = (parts, home, tmp_path / "files", out, "deepspeed=none", "trainer.save_steps=1",
             *(f"optim.{key}={value}" for key, value in constant.items()))
    endless = start(*given, "trainer.max_steps=100000", environment=sys.prefix)  # children of its own
    log, end = out / "train.log.jsonl", time.monotonic() + 300
    while time.monotonic() < end and endless.poll() is None and (not log.is_file() or log.read_text().count("\n") < 3):
        time.sleep(0.02)
    os.kill(max(children(endless.pid)), signal.SIGKILL)
    _, complained = endless.communicate(timeout=200)
    assert endless.returncode == 128 + signal.SIGKILL, complained
    assert "was killed by signal 9" in complained and "Traceback" not in complained, complained
    steps = max(parts.losses(out)) + 2
    said = run(*given, f"trainer.max_steps={steps}")
    assert "resumes from" in said and "2 processes on cpu, plain" in said
    config = configured(parts, home, tmp_path / "one", gradient_accumulation_steps=2, max_steps=steps)
    train_llm({**config, "optim": {**config["optim"], **constant}}, TuningTask)
    expected = parts.losses(tmp_path / "one")
    assert list(parts.losses(out)) == list(expected) == list(range(1, steps + 1))
    assert close(parts.losses(out), expected, within=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
                    reason="DeepSpeed on a CPU needs the package and g++")
@pytest.mark.parametrize("name", ["deepspeed_stage_2_offload", "deepspeed_stage_3"])
def test_zero_by_the_original_files(name: str, parts: ModuleType, home: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "zero"
    given = (parts, home, tmp_path / "files", out, f"deepspeed=configs/accelerate/{name}.yaml", "trainer.save_steps=2",
             "trainer.gradient_checkpointing=true")  # as published
    said = run(*given)
    task = TuningTask(read_run(configured(parts, home, tmp_path / "x")), ProcessGroup(), torch.device("cpu"))
    task.prepare()
    trained = sum(value.numel() for value in task.weights().values())
    assert f"{trained:,} of" in said and "2 processes on cpu, deepspeed" in said
    whole = parts.losses(out)
    assert close(whole, parts.losses(alone))
    shutil.rmtree(out / "checkpoint-4")
    assert "(step 2)" in run(*given) and parts.losses(out) == whole
    own = load_state_dict(out / "checkpoint-4" / "model.safetensors")
    expected = load_state_dict(alone / "checkpoint-4" / "model.safetensors")
    assert own.keys() == expected.keys()
    assert max(float((value - expected[key]).abs().max()) for key, value in own.items()) < 1e-3
    for source in exported(out / "checkpoint-4", tmp_path / "exported"):
        with torch.no_grad():
            for value in task.weights().values():
                value.zero_()
        load_agent(task.module, source)
        assert all(torch.equal(value, own[key]) for key, value in task.weights().items()), source


def exported(checkpoint: Path, out: Path) -> Iterator[Path]:
    """What DeepSpeed's script writes: a folder with one file, shards, safetensors; and one file as older ones did."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert

    for kind, options in {"one": {}, "shards": {"max_shard_size": "40KB"}, "safe": {"safe_serialization": True},
                          "safe_shards": {"safe_serialization": True, "max_shard_size": "40KB"}}.items():
        convert(str(checkpoint), str(out / kind), **options)
        files = sorted(path.suffix for path in (out / kind).iterdir())
        assert (len(files) > 2) == ("shards" in kind) and (".safetensors" in files) == ("safe" in kind), files
        yield out / kind
    yield out / "one" / "pytorch_model.bin"
