"""Runs of the LAVIS application at tiny size, on scenes of nano as image-caption json.

Skipped without LAVIS.
"""

from pathlib import Path

import lavis_runs
import pytest


@pytest.fixture(scope="session", autouse=True)
def lavis():
    lavis_runs.require_lavis()


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)  # as in the processes that these runs are compared with


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 images of nano's scenes and `pairs.json` next to them."""
    return lavis_runs.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def yaml(images, tmp_path):
    """stage, options → arguments of train.py for a tiny run on `images` into `tmp_path/NAME`."""

    def make(stage: str, *options: str, name="") -> list[str]:
        arguments = lavis_runs.write_config(stage, images, tmp_path / (name or stage))
        return [*arguments, *(["--options", *options] if options else [])]

    return make


@pytest.fixture
def run():
    """Build a run in this process and train it; returns the runner."""

    def do(arguments: list[str]):
        runner = lavis_runs.build(arguments)
        runner.train()
        return runner

    return do
