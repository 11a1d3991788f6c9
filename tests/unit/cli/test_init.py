"""`seed init`: the printed command trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llm_runs import APPLICATION, write_json_lines

from seed_multimodal.cli.init import KINDS
from seed_multimodal.cli.main import main
from seed_multimodal.training.llm import cli


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_init_prints_a_command_that_trains(kind: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(["init", "--like", kind, str(tmp_path / "mine"), "--json"]) == 0
    program, *overrides = json.loads(capsys.readouterr().out)["command"].split()[1:]
    if kind == "seed-llama":  # its data are codes
        talk = [{"role": "user", "content": [{"codes": list(range(32))}, "What is it?"]},
                {"role": "assistant", "content": ["A fox."]}]
        write_json_lines(tmp_path / "talk.jsonl", [{"messages": talk}] * 4)
        file = tmp_path / "mine" / "data.yaml"
        file.write_text(file.read_text().replace("log/own_data/codes", str(tmp_path / "talk.jsonl")))
    monkeypatch.chdir(APPLICATION)
    few = ["trainer.max_steps=1", "trainer.sample_steps=1", "trainer.report_to=[]", "trainer.curves=false",
           "trainer.device=cpu"]
    assert cli.main(Path(program).stem, APPLICATION / "configs", [*overrides, *few]) == 0
    assert list((tmp_path / "mine" / "run").rglob("*.safetensors"))
    samples, = (tmp_path / "mine" / "run" / "samples").iterdir()
    assert samples.name == "step-1.png" or samples.read_text().count("\n  model:") >= 1
