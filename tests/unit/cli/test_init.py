"""`seed init`: the printed command trains."""

from __future__ import annotations

import json

import pytest
from llm_runs import APPLICATION, environment
from real_processes import run_process
from warm_python import PYTHON

from seed_multimodal.cli.init import templates
from seed_multimodal.cli.main import main


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", templates())
def test_init_prints_a_command_that_trains(kind, tmp_path, capsys):
    assert main(f"init --like {kind} {tmp_path / 'mine'} --json".split()) == 0
    printed = json.loads(capsys.readouterr().out)["command"].split(" && ")
    printed[-1] += (
        " trainer.max_steps=1 trainer.sample_steps=1 trainer.report_to=[] trainer.curves=false"
        " trainer.device=cpu"
    )
    for python, *command in map(str.split, printed):
        run = run_process(
            [PYTHON, *command],
            cwd=APPLICATION,
            env=environment(),
        )
        assert python == "python" and run.returncode == 0, run.stderr
    assert list((tmp_path / "mine" / "run").rglob("*.safetensors"))
    (samples,) = (tmp_path / "mine" / "run" / "samples").iterdir()
    assert samples.name == "step-1.png" or samples.read_text().count("\n  model:") >= 1
