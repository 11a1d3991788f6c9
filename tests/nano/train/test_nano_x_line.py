"""The line of nano-x at toy size by its own script, killed and resumed, ending in a SEED-X that loads and answers; the
untrained nano that it starts from is of toy size, too."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm_python
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.systems.seed_x import SeedX
from seed_nano.report.__main__ import main as report
from seed_nano.report.judge import Judge, JudgeConfig
from seed_nano.train.__main__ import main
from seed_nano.train.clip import Tower
from seed_nano.train.config import ClipSizes, NanoConfig, VaeSizes
from seed_nano.train.vae import build_vae
from seed_nano.train_x.__main__ import LINE
from seed_nano.train_x.config import NanoXConfig
from seed_nano.train_x.workspace import XWorkspace
from seed_nano.world.scene import render
from seed_nano.world.splits import scene_at
from seed_nano.world.wide import render_wide, wide_at

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/nano_x/test.yaml"
PLAIN = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT = {**PLAIN, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
               "PYTHON": warm_python.PYTHON}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nano-x takes of a finished nano: autoencoder, tower, judge; random weights."""
    folder = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    config = NanoConfig(vae=VaeSizes(channels=[8, 8, 16]),
                        clip=ClipSizes(width=48, layers=2, heads=4, embedding=32))
    decoder = folder / "seed_tokenizer" / "diffusion_model"
    build_vae(config).save_pretrained(decoder / "vae")
    Tower(config).vision.save_pretrained(decoder / "image_encoder")
    Judge(JudgeConfig(widths=(8, 8, 8), blocks=(0, 1, 1))).save_pretrained(folder / "judge")
    return folder


def start(nano: Path, work: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", "scripts/nano_x_speedrun.sh", "--config", CONFIG, "--work", str(work), "--no-report", f"start={nano}",
         *words], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_line_is_killed_and_resumed_and_ends_in_a_system(nano: Path, tmp_path: Path) -> None:
    work, whole = tmp_path / "killed", tmp_path / "whole"
    first = start(nano, work)
    end = time.monotonic() + 150
    while time.monotonic() < end and first.poll() is None and not list(work.glob("sft/checkpoint-*")):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert not (work / "system" / "system.json").exists()

    for folder in (work, whole):
        script = start(nano, folder)
        said = script.communicate(timeout=180)[0]
        assert script.returncode == 0, said[-3000:]
    for part in ("vision", "llm", "agent", "detokenizer", "detokenizer/layout"):  # the same numbers
        one, other = ((folder / "system" / part / "model.safetensors").read_bytes() for folder in (work, whole))
        assert one == other, part

    seed = SeedX.from_pretrained(work / "system", log=None)
    picture = Image.fromarray(render(scene_at(0, 0, "val")))
    wide = Image.fromarray(render_wide(wide_at(0, 0, "val")))
    assert seed.pictures.views.grid(wide.size) == (2, 2) and seed.pictures.views.grid(picture.size) == (1, 1)
    assert isinstance(seed.describe(wide, max_new_tokens=4), str)
    assert seed.detect(picture, "the dog", max_new_tokens=4).picture.size == (64, 64)
    assert seed.draw("a noto dog").size == seed.edit(picture, "Put it at night.").size == (64, 64)
    rebuilt = [seed.reconstruct(picture, condition)[0] for condition in (None, picture)]
    assert rebuilt[0].tobytes() != rebuilt[1].tobytes()

    out = tmp_path / "report"
    assert report(["--model", str(work / "system"), "--judge", str(nano / "judge"), "--out", str(out), "--limit", "3",
                   "--splits", "val,counts"]) == 0
    sections = json.loads((out / "report.json").read_text())["splits"]["val"]
    assert {"conditioned", "detection", "wide", "edit", "caption"} <= set(sections)
    assert 0 < sections["edit"]["unchanged_psnr"]["value"] < 60 and 0 <= sections["wide"]["one_all"]["value"] <= 1
    assert (out / "detections.webp").is_file()


def test_without_a_finished_nano_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / CONFIG), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
                 "--only", "start", f"start={tmp_path}"], LINE) == 2
    assert "start must be the folder of a finished nano" in capsys.readouterr().err


def test_words_of_other_settings_are_refused(tmp_path: Path) -> None:
    """Those of the shipped system, by the settings that it was trained with and by others."""
    shutil.copytree(ROOT / "pretrained" / "nano-x" / "tokenizer", tmp_path / "tokenizer")
    config = NanoXConfig()
    assert XWorkspace(config, tmp_path, tmp_path).words.vocabulary.n_text == 800
    for changed in (replace(config, llm=replace(config.llm, text_vocabulary=500)),
                    replace(config, llm=replace(config.llm, locations=32))):
        with pytest.raises(ConfigError, match="has 800 text pieces and 16 image words and 64 locations, the settings"):
            _ = XWorkspace(changed, tmp_path, tmp_path).words
