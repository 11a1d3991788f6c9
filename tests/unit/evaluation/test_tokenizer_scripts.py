"""The evaluation scripts of SEED_Tokenizer."""

from __future__ import annotations

import json
import os
import runpy
import sys

import pytest
from PIL import Image
from real_processes import run_process
from repository import ROOT

FOLDER = ROOT / "SEED_Tokenizer"


@pytest.mark.process
@pytest.mark.slow
def test_retrieval_script_reads_its_variables(tiny_folder, tmp_path):
    items = [{"image": name, "caption": name} for name in ("fox.png", "whale.png")]
    (tmp_path / "list.json").write_text(json.dumps(items))
    variables = {
        "MODEL": str(tiny_folder),
        "DATA": str(tmp_path / "list.json"),
        "IMAGES": str(ROOT / "images"),
        "OUT": str(tmp_path / "out"),
        # `scripts/python.sh` uses its Python.
        "VIRTUAL_ENV": sys.prefix,
    }
    script = FOLDER / "eval_scripts" / "retrieval_flickr.sh"
    done = run_process(
        f"sh {script} --device cpu --decoder none".split(),
        timeout=170,
        cwd=tmp_path,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["n"], report["model"]) == (2, str(tiny_folder))


def test_reconstruction_demo(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--device cpu --model {tiny_folder} --steps 2 --json --image"
    monkeypatch.setattr(sys, "argv", ["demo", *flags.split(), str(ROOT / "images" / "fox.png")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "eval" / "seed_inference.py"), run_name="__main__")
    assert ended.value.code == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["codes"]) == 32
    assert Image.open(tmp_path / "recon_fox.png").width
