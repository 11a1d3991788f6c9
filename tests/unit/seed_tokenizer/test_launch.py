"""The launcher: several processes under torchrun end with their own exit code and sentence."""

from __future__ import annotations

import signal
import sys
import time

import pytest


@pytest.mark.process
def test_a_refusal_in_several_processes(start, tmp_path):
    process = start("sh", "train_scripts/codebook.sh", "--options", f"model.pretrained={tmp_path}/no.pth",
                    f"run.output_dir={tmp_path}/c", CONFIG="lavis/projects/nano/pretrain_codebook.yaml",
                    NPROC_PER_NODE="2")
    out, error = process.communicate(timeout=150)
    assert process.returncode == 2, error
    assert "no.pth: there is no such stage-1 checkpoint" in error and "Traceback" not in out + error


def test_a_wrong_configuration_is_refused_before_processes_start(capsys, monkeypatch):
    import launch

    monkeypatch.setenv("NPROC_PER_NODE", "2")
    arguments = ["--config", "lavis/projects/nano/pretrain_qformer.yaml", "--port", "18273", "--options"]
    assert launch.main([*arguments, "model.nonsense=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.py: ") and "model: unknown key 'nonsense'" in error and error.count("\n") == 1


def test_numbers_of_processes_are_checked(capsys, monkeypatch):
    import launch

    arguments = ["--config", "x.yaml", "--port", "18273"]
    monkeypatch.setenv("NNODES", "two")
    assert launch.main(arguments) == 2 and "NNODES must be a positive number" in capsys.readouterr().err
    monkeypatch.setenv("NNODES", "2")
    assert launch.main(arguments) == 2 and "first one's address" in capsys.readouterr().err


def test_a_single_process_needs_no_torchrun(capsys, monkeypatch, tmp_path):
    """The released configuration without its data: exit code 2 and one sentence that says what to set."""
    import launch

    monkeypatch.setenv("NPROC_PER_NODE", "1")
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config", "lavis/projects/blip2/train/pretrain_codebook.yaml", "--port", "18272"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data/cc3m/cc3m.json" in error
    assert "datasets.conceptual_caption_3m.build_info" in error and not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_with_a_sentence(start, tmp_path, number):
    """torchrun passes the signal on and waits; a script that notes it stands in the trainer's place."""
    (tmp_path / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent / os.environ['RANK']\n"
        "def hear(number, frame):\n    here.write_text(str(number))\n    sys.exit(128 + number)\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n    signal.signal(number, hear)\n"
        "here.touch()\n"
        "while True:\n    time.sleep(0.1)\n")
    script = ("import sys; from argparse import Namespace; from pathlib import Path; import launch, train\n"
              "train.HERE, launch.check = Path(sys.argv[1]), lambda script: None\n"
              "sys.exit(launch.torchrun(Namespace(master_addr='', debug=False), 1, 2, []))")
    process = start(sys.executable, "-c", script, str(tmp_path))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not all((tmp_path / r).is_file() for r in "01"):
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert error.splitlines()[-1] == f"launch.py: ended by {number.name}, and its 2 processes with it."
    assert "Traceback" not in error and [(tmp_path / r).read_text() for r in "01"] == [str(int(number))] * 2


@pytest.mark.process
def test_a_lost_process_is_a_sentence(start, tmp_path):
    """It cannot speak for itself, and torchrun would show a traceback of its own."""
    (tmp_path / "train.py").write_text("import os, signal, time\n"
                                       "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
                                       "time.sleep(60)\n")
    script = ("import sys; from argparse import Namespace; from pathlib import Path; import launch, train\n"
              "train.HERE, launch.check = Path(sys.argv[1]), lambda script: None\n"
              "sys.exit(launch.torchrun(Namespace(master_addr='', debug=False), 1, 2, []))")
    process = start(sys.executable, "-c", script, str(tmp_path))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, error
    assert error.strip() == ("launch.py: process 1 was killed by signal 9 (which often means that memory ran out), and "
                             "the others of this node were ended with it; the same command resumes from the last "
                             "checkpoint.")
