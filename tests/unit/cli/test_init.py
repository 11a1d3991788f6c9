"""`seed init --like`: the printed command trains."""

import json
import runpy
import sys

import pytest
from repository import APPLICATION

from seed_multimodal.cli.init import templates
from seed_multimodal.cli.main import main

SHORT = "trainer.max_steps=1 trainer.sample_steps=1 trainer.report_to=[] trainer.curves=false"


# One here, the other trainings at night.
KINDS = [
    kind if kind == "seed-llama" else pytest.param(kind, marks=pytest.mark.nightly)
    for kind in templates()
]


@pytest.mark.process  # workers read the data
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_init_prints_a_command_that_trains(kind, tmp_path, capsys, monkeypatch):
    assert main(f"init --like {kind} {tmp_path / 'mine'} --json".split()) == 0
    commands = json.loads(capsys.readouterr().out)["command"].split(" && ")
    commands[-1] += f" {SHORT} trainer.device=cpu"
    monkeypatch.chdir(APPLICATION)
    for command in commands:
        python, program, *arguments = command.split()
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(program, run_name="__main__")
        assert not ended.value.code, capsys.readouterr().err
    assert list((tmp_path / "mine" / "run").rglob("*.safetensors"))
    (samples,) = (tmp_path / "mine" / "run" / "samples").iterdir()
    assert samples.name == "step-1.png" or samples.read_text().count("\n  model:") >= 1
