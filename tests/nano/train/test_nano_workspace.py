"""Nano's work folder: what is kept there is made anew when it no longer fits; stages say what must be run first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seed_multimodal.disk import lock
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.checkpoint_folders import describe, files_of, publish, temporary_folder
from seed_multimodal.training.stage import train_stage
from seed_multimodal.weights import load_state_dict, save_state_dict
from seed_nano.train.__main__ import main
from seed_nano.train.clip import Tower, embeddings
from seed_nano.train.config import NanoConfig, load_config
from seed_nano.train.vae import VaeTask, build_vae, latents
from seed_nano.train.workspace import Workspace

TEST = Path(__file__).resolve().parents[3] / "configs" / "nano" / "test.yaml"


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
    assert main(["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path / "system"), "--only",
                 "unet"]) == 2
    assert "[unet] was trained before vae was trained again" in capsys.readouterr().out


def test_the_system_s_folder_does_not_hold_the_work_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "work", tmp_path):
        assert main(["--config", str(TEST), "--work", str(tmp_path / "work"), "--out", str(out)]) == 2
        assert f"--out {out}: holds the work folder" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_stage_is_finished_again_for_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(out: str) -> tuple[bytes, int]:
        config = load_config(TEST, ["train_vae.steps=1", "train_vae.batch_size=2", "train_vae.curves=false"])
        space = Workspace(config, tmp_path, tmp_path / out)
        VaeTask(space).train()
        return ((space.decoder_folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes(),
                space.record("vae").stat().st_mtime_ns)

    first = train("a")
    assert "done:" in capsys.readouterr().out
    assert train("b") == first  # the same weights, and nothing that was built on them is older
    said = capsys.readouterr().out
    assert "so the stage is finished again" in said and "resumes from" in said and "(step 1)" in said
    assert train("b") == first and "already done" in capsys.readouterr().out


def test_words_of_other_settings_are_refused(tmp_path: Path) -> None:
    Workspace(load_config(TEST), tmp_path, tmp_path / "system").words  # noqa: B018
    for change, said in (("llm.text_vocabulary=500", "500 and 64"), ("tokenizer.codes=128", "600 and 128")):
        with pytest.raises(ConfigError, match=f"tokenizer.model: has 600 text pieces and 64 image words.*{said}"):
            Workspace(load_config(TEST, [change]), tmp_path, tmp_path / "system").words  # noqa: B018


@pytest.mark.parametrize("content", ["{\"steps\": 4, ", "[]"])
def test_a_damaged_record_of_the_language_model_is_named(tmp_path: Path, content: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "llm_pretrain" / "summary.json"
    file.parent.mkdir()
    file.write_text(content)
    line = ["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path / "system"), "--only", "llm"]
    assert main(line) == 2
    assert f"{file}: " in (said := capsys.readouterr().err) and "remove it" in said


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    space = Workspace(load_config(TEST, ["pool=8"]), tmp_path, tmp_path / "system")
    for folder, name, make in ((space.decoder_folder / "vae", "diffusion_pytorch_model.safetensors", latents),
                               (space.decoder_folder / "image_encoder", "model.safetensors", embeddings)):
        model = build_vae(space.config) if make is latents else Tower(space.config).vision
        model.save_pretrained(folder)
        made, weights = make(space), (folder / name).read_bytes()
        assert len(made) == 8 and make(space).equal(made)
        (tmp_path / f"{make.__name__}.safetensors").unlink()
        for damaged in (weights[:-100], b"", b"junk"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(folder)):
                make(space)
        (folder / name).write_bytes(weights)
        save_state_dict({key: value.half() for key, value in load_state_dict(folder / name).items()}, folder / name)
        torch.testing.assert_close(make(space), made, atol=0.05, rtol=0.05)  # as stage `assemble` leaves them


def test_assembling_names_weights_that_are_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "system"
    decoder = out / "seed_tokenizer" / "diffusion_model"
    for folder in (decoder / "vae", decoder / "image_encoder", decoder.parent, decoder / "unet", out / "seed_llama"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
    file = out / "seed_llama" / "model.safetensors"
    file.write_bytes(b"junk")
    line = ["--config", str(TEST), "--work", str(tmp_path / "work"), "--out", str(out), "--only", "assemble"]
    assert main(line) == 2 and f"{file}: " in capsys.readouterr().err


def test_a_damaged_language_model_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("llm_pretrain", "llm_sft"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "summary.json").write_text('{"steps": 4, "seconds": 1.0, "tokens": 1}')
    line = ["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path / "system"), "--only", "llm"]
    checkpoint = tmp_path / "llm_sft" / "checkpoint-4"
    assert main(line) == 2 and f"{checkpoint}: cannot be installed: it has no manifest" in capsys.readouterr().err
    made = temporary_folder(tmp_path / "llm_sft", 4)
    for name in ("config.json", "generation_config.json"):
        (made / name).write_text("{}")
    save_state_dict({"weight": torch.zeros(7)}, made / "model.safetensors")
    publish(made, 4, {name: describe(made, name) for name in files_of(made)})
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert main(line) == 2 and f"has {len(whole) - 4} of {len(whole)} bytes" in capsys.readouterr().err
    assert not (tmp_path / "system" / "seed_llama").exists()
    file.write_bytes(whole)
    assert main(line) == 0 and (tmp_path / "system" / "seed_llama" / "model.safetensors").read_bytes() == whole


def test_two_runs_are_not_at_the_same_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(TEST), "--work", str(tmp_path), "--out", str(tmp_path / "system"), "--only"]
    with lock(tmp_path / ".codes.lock"):
        assert main([*line, "codes"]) == 2
        assert f"{tmp_path}: another run is at stage codes" in capsys.readouterr().err
        assert main([*line, "assemble"]) == 2 and "stage vae makes it" in capsys.readouterr().err
    assert main([*line, "codes"]) == 2 and "stage tokenizer makes it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.lock"))


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="a folder that not even root may write into")
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(TEST), "--work", str(tmp_path / "work"), "--out", "/proc/sys", "--only", "recipe"]
    assert main(line) == 2 and "/proc/sys: this folder cannot be written." in capsys.readouterr().err
    assert not list((tmp_path / "work").iterdir())
