"""LAVIS next to a recent transformers, in a fresh process; the error without LAVIS."""

import sys
from subprocess import CompletedProcess

import pytest
from lavis_runs import APPLICATION
from llm_runs import environment
from real_processes import run_process

CODE = """
import sys
from seed_lavis import compat, register
heavy = {"transformers", "diffusers", "timm", "pandas", "decord", "iopath", "cv2", "torchvision"}
assert not heavy & sys.modules.keys()
register()
assert "image_text_pretrain" in compat.registry.list_tasks()
"""


def run_code(code: str, *flags: str) -> CompletedProcess[str]:
    """A program next to the application."""
    command = [sys.executable, *flags, "-c", code]
    return run_process(command, 120, cwd=APPLICATION, env=environment())


@pytest.mark.slow
@pytest.mark.process
def test_register_in_a_fresh_process():
    # Without LAVIS's heavy imports; all names of the YAML files: test_options.py, test_runs.py.
    done = run_code(CODE, "-W", "error::FutureWarning")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_train_without_lavis():
    # One line with the command that installs it.
    project = "lavis/projects/nano/pretrain_qformer.yaml"
    code = (
        # Without the package's metadata.
        "import sys; from importlib.metadata import MetadataPathFinder as finder\n"
        "find = finder.find_distributions\n"
        "finder.find_distributions = classmethod(lambda cls, context:"
        " () if context.name == 'salesforce-lavis' else find(context))\n"
        f"import train; sys.exit(train.main(['--cfg-path', '{project}']))"
    )
    done = run_code(code)
    assert done.returncode == 2
    assert "install.sh --lavis" in done.stderr and "Traceback" not in done.stderr
