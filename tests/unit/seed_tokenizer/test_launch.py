"""The training scripts' launcher: several processes under torchrun end with their own exit code and sentence."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest


@pytest.mark.process
def test_launch_refuses_in_several_processes(start, tmp_path):
    process = start("sh", "train_scripts/codebook.sh", "--options", f"model.pretrained={tmp_path}/no.pth",
                    f"run.output_dir={tmp_path}/c", CONFIG="lavis/projects/nano/pretrain_codebook.yaml",
                    NPROC_PER_NODE="2")
    out, error = process.communicate(timeout=150)
    assert process.returncode == 2, error
    assert "no.pth: there is no such stage-1 checkpoint" in error and "Traceback" not in out + error


@pytest.mark.process
def test_launch_checks_the_number_of_nodes(start):
    process = start("sh", "train_scripts/codebook.sh", NNODES="two", NPROC_PER_NODE="1")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "NNODES (HOST_NUM) must be a number from 1 on, not 'two'." in error


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_passes_signals_on_and_names_a_lost_process(start, tmp_path, number):
    """A script that waits for its end stands in the trainer's place; SIGKILL hits one of its processes."""
    script = tmp_path / "wait.py"
    script.write_text("import os, pathlib, signal, sys, time\n"
                      "here = pathlib.Path(__file__).parent / os.environ['RANK']\n"
                      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
                      "here.write_text(str(os.getpid()))\n"
                      "while True:\n    time.sleep(0.1)\n")
    process = start(sys.executable, "-m", "seed_multimodal.training.torchrun", "--standalone", "--nproc-per-node=2",
                    str(script))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not all((tmp_path / r).is_file() for r in "01"):
        time.sleep(0.05)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.kill(int((tmp_path / "1").read_text()), number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in error, error
    assert ("a process was killed by signal 9" in error) == (number == signal.SIGKILL)
