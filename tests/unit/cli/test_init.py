"""`seed init`: the printed command trains."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from llm_runs import APPLICATION, environment, write_json_lines
from warm_python import PYTHON

from seed_multimodal.cli.init import KINDS
from seed_multimodal.cli.main import main


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_init_prints_a_command_that_trains(kind: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["init", "--like", kind, str(tmp_path / "mine"), "--json"]) == 0
    python, *command = json.loads(capsys.readouterr().out)["command"].split()
    if kind == "seed-llama":  # its data are codes
        talk = [{"role": "user", "content": [{"codes": list(range(32))}, "What is it?"]},
                {"role": "assistant", "content": ["A fox."]}]
        write_json_lines(tmp_path / "talk.jsonl", [{"messages": talk}] * 4)
        file = tmp_path / "mine" / "data.yaml"
        file.write_text(file.read_text().replace("log/own_data/codes", str(tmp_path / "talk.jsonl")))
    few = ["trainer.max_steps=1", "trainer.sample_steps=1", "trainer.report_to=[]", "trainer.curves=false",
           "trainer.device=cpu"]
    run = subprocess.run([PYTHON, *command, *few], cwd=APPLICATION, env=environment(), capture_output=True, text=True)
    assert python == "python" and run.returncode == 0, run.stderr
    assert list((tmp_path / "mine" / "run").rglob("*.safetensors"))
    samples, = (tmp_path / "mine" / "run" / "samples").iterdir()
    assert samples.name == "step-1.png" or samples.read_text().count("\n  model:") >= 1
