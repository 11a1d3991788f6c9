"""Names of the original weights, quiet loading, errors of programs."""

import argparse
import errno
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from seed_multimodal.entry import COMMAND_FAILED, run_guarded, run_program
from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.progress import quiet_loading
from seed_multimodal.weights import find


def test_is_hub_name(tmp_path, monkeypatch):
    # A path that is taken for a hub name would be searched on the network.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    names = ["AILab-CVC/seed-tokenizer-2", Path("owner/name")]
    paths = "pretrained/nano mine/llm ./here ../there ~/home /a/b a/b/c nano owner/".split()
    assert [name for name in [*names, *paths] if find.is_hub_name(name)] == names


def test_quiet_loading_is_of_its_thread(capfd):
    # Messages and progress bars of a user's own loading are shown.
    from transformers.utils import logging

    def load(text):
        logging.get_logger("transformers.any").error(text)
        for _ in logging.tqdm(range(2), desc=text):
            pass

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with quiet_loading("transformers"):
            load("ours")
            other = threading.Thread(target=load, args=("theirs",))
            other.start()
            other.join()
            assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
    shown = capfd.readouterr().err
    assert "ours" not in shown and "theirs: 100%" in shown


# Error → what its line names. safetensors has the number of an error only in its text.
ERRORS = {
    "user": (ConfigError("a.yaml: no."), "a.yaml: no."),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt"),
    "safetensors": (SafetensorError("I/O error: No space left (os error 28)"), "disk"),
    "gradio": (ModuleNotFoundError(name="gradio"), "--extras demo"),
    "flask": (ModuleNotFoundError("No module named 'flask'", name="flask"), "flask"),
    "cv2": (ModuleNotFoundError(name="cv2"), "opencv-python-headless"),
}


@pytest.mark.parametrize("error, named", ERRORS.values(), ids=ERRORS)
def test_run_program_prints_errors_without_a_traceback(error, named, capsys):
    def work(args):
        raise error

    assert run_program(argparse.ArgumentParser(prog="x"), work, []) == COMMAND_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x: ") and named in line
    with pytest.raises(type(error)):
        run_program(argparse.ArgumentParser(), work, ["--debug"])


def test_errors_of_the_machine_are_one_line(capsys):
    # What torch and Python raise.
    for work in (lambda: torch.empty(2**58), lambda: bytearray(2**62)):
        assert run_guarded("seed", False, work) == COMMAND_FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("seed: ") and "memory" in line


@pytest.mark.parametrize(
    "rank, world_size", [("1", ""), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "two"), ("", "2")]
)
def test_a_process_that_is_none_of_a_run_is_refused(monkeypatch, capsys, rank, world_size):
    # It would work on nobody's share, or on all of the others'.
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert run_guarded("seed", False, lambda: 0) == COMMAND_FAILED
    assert f"RANK is {rank or 'not set'}" in capsys.readouterr().err


def test_defects_have_a_traceback():
    # An error that is none of the user's is not hidden.
    with pytest.raises(FileNotFoundError):
        run_guarded("seed", False, lambda: len(Path("/nowhere/at all").read_text()))


def test_run_guarded_formats_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restores it afterwards
    assert run_guarded("seed", False, lambda: 0) == 0
    text = warnings.formatwarning("a.pt: look at it.", SeedWarning, "file.py", 1)
    assert text.startswith("seed: ") and "a.pt" in text and "file.py" not in text
