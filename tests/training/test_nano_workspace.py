"""Nano's work folder: what is kept there is made anew when it no longer fits; stages say what must be run first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seed_multimodal.training.nano.__main__ import main
from seed_multimodal.training.nano.config import NanoConfig, load_config
from seed_multimodal.training.nano.vae import VaeTask
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.training.stage import train_stage

TEST = Path(__file__).resolve().parents[2] / "configs" / "nano" / "test.yaml"


def test_what_is_kept_is_made_anew_when_it_no_longer_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = 0

    def value(**changes: int) -> int:
        def make() -> torch.Tensor:
            nonlocal made
            made += 1
            return torch.tensor([made])

        return int(Workspace(NanoConfig(**changes), tmp_path, tmp_path).cached("codes", "tokenizer", make))

    def said() -> str:
        return capsys.readouterr().out

    file, record = tmp_path / "codes.safetensors", tmp_path / "tokenizer.done.json"
    record.write_text("{}")
    assert [value(), value()] == [1, 1] and said() == ""
    assert value(pool=64) == 2 and "pool: 60000 -> 64" in said()
    assert value(pool=64) == 2 and value(pool=64, seed=3) == 3 and "seed: 0 -> 3" in said()
    file.write_bytes(file.read_bytes()[:-4])
    assert value(pool=64, seed=3) == 4 and f"{file} is made anew: it is damaged" in said()
    later = file.stat().st_mtime_ns + 10**9
    os.utime(record, ns=(later, later))
    assert value(pool=64, seed=3) == 5 and "tokenizer was trained again" in said()
    save_file({"value": torch.tensor([9])}, file)  # of an earlier version, which kept no settings
    os.utime(record, ns=(1, 1))
    assert value() == 9 and said() == ""


@pytest.mark.parametrize(("stage", "first"), [
    ("unet", "vae"), ("codes", "tokenizer"), ("unet2", "tokenizer"), ("records", "tokenizer"), ("assemble", "vae")])
def test_a_stage_names_the_one_to_run_before_it(tmp_path: Path, stage: str, first: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path / "system"), "--only", f" {stage},"]
    assert main(line) == 2
    assert f"stage {first} makes it (--only {first})" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_that_is_done_tells_other_settings_and_newer_parts(tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def train(*changes: str) -> str:
        config = load_config(TEST, ["train_vae.steps=1", "train_vae.batch_size=2", "train_vae.curves=false", *changes])
        train_stage(VaeTask(Workspace(config, tmp_path, tmp_path)), tmp_path)
        return capsys.readouterr().out

    train()
    again = train()
    assert "already done" in again and "other settings" not in again
    assert "other settings" not in train("train_vae.log_every=9", "pool=64")
    changed = train("vae.layers=2", "train_vae.lr=0.1")
    assert "train_vae.lr: 0.002 -> 0.1; vae.layers: 1 -> 2; remove" in changed
    record = tmp_path / "unet.done.json"
    record.write_text("{}")
    os.utime(record, ns=(1, 1))
    assert main(["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path), "--only", "unet"]) == 2
    assert "[unet] was trained before vae was trained again" in capsys.readouterr().out
