"""The evaluation script of SEED_Tokenizer."""

from __future__ import annotations

import json
import os
import sys

import pytest
from real_processes import run_process
from repository import ROOT


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
        # `scripts/environment.sh` uses its Python.
        "VIRTUAL_ENV": sys.prefix,
    }
    script = ROOT / "SEED_Tokenizer" / "eval_scripts" / "retrieval_flickr.sh"
    done = run_process(
        f"sh {script} --device cpu --decoder none".split(),
        timeout=170,
        cwd=tmp_path,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["n"], report["model"]) == (2, str(tiny_folder))
