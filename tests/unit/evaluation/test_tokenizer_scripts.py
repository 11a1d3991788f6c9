"""The evaluation scripts of SEED_Tokenizer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from real_processes import run_process
from repository import ROOT

FOLDER = ROOT / "SEED_Tokenizer"


def _environment(**variables: str) -> dict[str, str]:
    """`scripts/python.sh` uses the Python of VIRTUAL_ENV."""
    return {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


@pytest.mark.process
def test_retrieval_script_runs(tiny_folder: Path, tmp_path):
    images = ["fox.png", "whale.png"]
    (tmp_path / "list.json").write_text(
        json.dumps([{"image": name, "caption": name} for name in images])
    )
    done = run_process(
        (
            f"sh {FOLDER / 'eval_scripts' / 'retrieval_flickr.sh'} --device cpu --decoder none"
        ).split(),
        timeout=170,
        cwd=tmp_path,
        env=_environment(
            MODEL=str(tiny_folder),
            DATA=str(tmp_path / "list.json"),
            IMAGES=str(ROOT / "images"),
            OUT=str(tmp_path / "out"),
        ),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == 2 and report["model"] == str(tiny_folder)
    assert json.loads(done.stdout.splitlines()[-1]) == report


@pytest.mark.process
def test_reconstruction_demo(tiny_folder: Path, tmp_path):
    command = (
        f"{sys.executable} {FOLDER / 'eval' / 'seed_inference.py'} --device cpu --model".split()
    )
    flags = f"{tiny_folder} --image {ROOT / 'images' / 'fox.png'} --steps 2 --json".split()
    done = run_process(
        [*command, *flags],
        timeout=170,
        cwd=tmp_path,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert (
        len(json.loads(done.stdout)["codes"]) == 32
        and Image.open(tmp_path / "recon_fox.png").width > 0
    )
