"""From images and a vision encoder to a tokenizer in use, by exactly the commands that each run prints."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from lavis_runs import TINY_STAGE2, environment, write_clip, write_text_encoder


def write_eva(file: Path) -> Path:
    """A vision encoder's file as EVA's, at the size of `lavis_runs.TINY`."""
    from seed_multimodal.nn.eva import EvaConfig, EvaVit

    torch.manual_seed(1)
    torch.save(EvaVit(EvaConfig(image_size=64, patch_size=16, width=32, depth=1, heads=2, mlp_width=64)).state_dict(),
               file)
    return file


def printed(text: str) -> list[str]:
    return [line.removeprefix("Next: ") for line in text.splitlines() if line.startswith("Next: ")]


@pytest.fixture
def follow(tmp_path, capsys):
    """Run a printed command from another folder; returns what it prints."""
    import evaluate

    from seed_multimodal.cli.main import main

    def do(command: str) -> str:
        program, *arguments = shlex.split(command)
        capsys.readouterr()
        if program == "seed":
            assert main(arguments) == 0, command
        elif program == "python":
            assert evaluate.main(arguments[1:]) == 0, command
        else:
            done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment(), capture_output=True,
                                  text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
        return capsys.readouterr().out

    return do


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("case", ["eva", "eva trained", "clip", "clip trained", "seed1", "lavit eva", "lavit clip"])
def test_the_printed_commands_evaluate_export_and_tokenise(case, yaml, run, follow, pictures, tmp_path, capsys,
                                                           monkeypatch):
    """The vision encoder is EVA's file or a CLIP folder, frozen or trained further."""
    monkeypatch.chdir(tmp_path)
    clip, lavit = "clip" in case, "lavit" in case
    vision = write_clip(tmp_path / "clip") if clip else write_eva(tmp_path / "eva.pth")
    sizes = f"model.vit={{patch_size: 16, width: 32, depth: 1, heads: 2, mlp_width: 64, pre_norm: {clip}}}"
    options = [f"model.vit_weights={vision}", sizes]
    if lavit:
        heads = "model.merger={merger_depth: 1, merger_heads: 2, merger_mlp_width: 64, llm_width: 8}"
        run(yaml("lavit", *options, heads))
        commands = printed(capsys.readouterr().out)
    else:
        run(yaml("stage1", *options, f"model.freeze_vit={'trained' not in case}", "run.max_epoch=1"))
        evaluation, second = printed(capsys.readouterr().out)
        assert "train" in json.loads(follow(evaluation).splitlines()[-1])
        if case == "seed1":
            checkpoint = tmp_path / "stage1" / "checkpoint_0.pth"
            run(yaml("seed1", f"model.pretrained={checkpoint}", *options, "run.max_epoch=1",
                     f"model.text_encoder={write_text_encoder(tmp_path / 'diffusion')}"))
            commands = printed(capsys.readouterr().out)
        else:
            commands = printed(follow(f"{second} --options run.max_epoch=1 run.iters_per_epoch=2 {TINY_STAGE2[1]} "
                                      f"{TINY_STAGE2[3]}"))
    evaluation, *exports, use = commands
    assert json.loads(follow(evaluation).splitlines()[-1])["train"]["loss"] > 0
    for export in exports:
        follow(export)
    codes = [int(code) for code in follow(use).split()[-16 if lavit else -32:] if code.isdigit()]
    assert codes and all(code < 8192 for code in codes)
