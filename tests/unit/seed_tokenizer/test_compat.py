"""LAVIS next to a recent transformers, in a fresh process; the error without LAVIS."""

from __future__ import annotations

import sys

import pytest

CODE = """
import sys
from seed_lavis import compat, register
heavy = {"transformers", "diffusers", "timm", "pandas", "decord", "iopath", "cv2", "torchvision"}
assert not heavy & sys.modules.keys()
register()
assert "image_text_pretrain" in compat.registry.list_tasks()
"""


def run_code(start, *command: str) -> tuple[str, str, int]:
    process = start(sys.executable, *command)
    output, error = process.communicate(timeout=120)
    return output, error, process.returncode


@pytest.mark.process
def test_register_in_a_fresh_process(start):
    # Without LAVIS's heavy imports; all names of the YAML files: test_options.py, test_runs.py.
    _, error, code = run_code(start, "-W", "error::FutureWarning", "-c", CODE)
    assert code == 0, error


@pytest.mark.process
def test_train_without_lavis(start):
    # One line with the command that installs it.
    project = "lavis/projects/nano/pretrain_qformer.yaml"
    code = (
        "import sys; sys.modules['lavis'] = None\n"  # makes `import lavis` fail
        f"import train; sys.exit(train.main(['--cfg-path', '{project}']))"
    )
    _, error, code = run_code(start, "-c", code)
    assert code == 2
    assert "install.sh --lavis" in error and "Traceback" not in error
