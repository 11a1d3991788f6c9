"""The line of nano-lavit at toy size by its own script, on the shipped nano: killed in the language model's training,
resumed, ending in a LaVIT that loads, reads, writes and draws; its report."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import warm_python
from PIL import Image
from safetensors import safe_open

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.lavit import LavitTokenizer
from seed_multimodal.systems.lavit import Lavit
from seed_nano.report.__main__ import main as report
from seed_nano.train.__main__ import main
from seed_nano.train_lavit.__main__ import LINE
from seed_nano.train_lavit.config import LanguageSizes, NanoLavitConfig, TokenizerSizes
from seed_nano.train_lavit.workspace import LavitSpace
from seed_nano.world.scene import render
from seed_nano.world.splits import scene_at

ROOT = Path(__file__).resolve().parents[3]
NANO = ROOT / "pretrained" / "nano"
CONFIG = "configs/nano_lavit/test.yaml"
PLAIN = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT = {**PLAIN, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
               "PYTHON": warm_python.PYTHON}


def start(work: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", "scripts/nano_lavit_speedrun.sh", "--config", CONFIG, "--work", str(work), "--no-report",
         f"start={NANO}"], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_line_is_killed_and_resumed_and_ends_in_a_system(tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = start(work)
    end = time.monotonic() + 200
    while time.monotonic() < end and first.poll() is None and not list(work.glob("language/checkpoint-*")):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert not (work / "system" / "system.json").exists()
    script = start(work)
    said = script.communicate(timeout=250)[0]
    assert script.returncode == 0, said[-3000:]
    assert "[tokenizer] already done" in said

    system = work / "system"
    with safe_open(system / "tokenizer" / "model.safetensors", "pt") as handle:  # the tower is nano's, kept once
        assert not [name for name in handle.keys() if name.startswith("encoder.")]  # noqa: SIM118
    lavit = Lavit.from_pretrained(system, log=None)
    picture = Image.fromarray(render(scene_at(0, 0, "val")))
    assert isinstance(lavit.describe(picture), str) and isinstance(lavit.ask(picture, "What is there?"), str)
    hot = {"do_sample": True, "temperature": 10.0, "top_k": 0}  # of an untrained model the likeliest word is no code
    assert lavit.draw("a dog on a meadow", **hot).size == (64, 64)
    assert lavit.draw("a dog on a meadow", ratio="3:2", **hot).size == (80, 48)
    assert lavit.compose([picture, "Put it at night."], **hot).size == (64, 64)
    report(["--model", str(system), "--judge", str(NANO / "judge"), "--out", str(tmp_path / "report"), "--limit", "1",
            "--splits", "val"])
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["aims"] and (tmp_path / "report" / "tokens.png").stat().st_size > 1000

    # Where the system stands beside the nano it was built on, it says so in a way that can be moved with it.
    shutil.copytree(system, tmp_path / "shipped" / "nano-lavit")
    (tmp_path / "shipped" / "nano").symlink_to(NANO)
    assert main(["--config", CONFIG, "--work", str(work), "--out", str(tmp_path / "shipped" / "nano-lavit"), "--only",
                 "assemble", f"start={tmp_path / 'shipped' / 'nano'}"], LINE) == 0
    assert Lavit.from_pretrained(tmp_path / "shipped" / "nano-lavit", log=None).describe(picture) == lavit.describe(
        picture)


def test_words_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    """Else the language model would be trained with the words of an earlier run, whatever the settings say."""
    config = NanoLavitConfig(tokenizer=TokenizerSizes(codes=32), llm=LanguageSizes(text_vocabulary=300))
    texts = ["a red picture a green picture a blue picture a grey picture What is red? plain words"] * 30
    made = LavitTokenizer.train(texts, tmp_path / "words", 300, 32, 16)
    assert LavitSpace(config, tmp_path, tmp_path).words.vocabulary == made.vocabulary
    for name, sizes in (("llm", LanguageSizes(text_vocabulary=301)), ("tokenizer", TokenizerSizes(codes=64))):
        with pytest.raises(ConfigError, match="has 300 text pieces and 32 image words, the settings .*remove the file"):
            _ = LavitSpace(replace(config, **{name: sizes}), tmp_path, tmp_path).words


def test_without_a_finished_nano_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / CONFIG), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"),
                 f"start={tmp_path}"], LINE) == 2
    told = capsys.readouterr().err
    assert "start must be the folder of a finished nano" in told and "Traceback" not in told
