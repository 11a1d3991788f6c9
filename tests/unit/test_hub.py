"""Names of the original weights, downloads, quiet loading, errors of programs."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

import pytest

from seed_multimodal import hub
from seed_multimodal.entry import COMMAND_FAILED, run_guarded, run_program
from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.originals import original_parts
from seed_multimodal.progress import quiet_loading


def test_is_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("AILab-CVC/seed-tokenizer-2", Path("owner/name")):
        assert hub.is_hub_name(name)
    for name in (
        "pretrained/nano",
        "mine/words",
        "./here",
        "../there",
        "~/home",
        "/a/b",
        "a/b/c",
        "nano",
        "owner/",
    ):
        assert not hub.is_hub_name(name), name


def test_released_folder_and_locate(tmp_path, monkeypatch):
    assert hub.original_folder("AILab-CVC/seed-llama-8b-sft") == "pretrained/seed_llama_8b_sft"
    assert (
        hub.original_folder("stabilityai/stable-diffusion-xl-base-1.0")
        == "pretrained/stable-diffusion-xl-base-1.0"
    )
    assert hub.original_folder("owner/name") == "owner/name"
    assert hub.locate_system("NANO") == hub.locate("pretrained/nano")
    monkeypatch.chdir(tmp_path)
    assert (hub.locate("pretrained/nano") or Path()).is_dir()  # from the repository's root
    assert hub.locate("no/such/folder") is None


def test_not_on_disk_names_folders_of_the_repository_relative_to_it(tmp_path):
    root = Path(hub.__file__).resolve().parents[2]
    part = original_parts()["8b"]
    for path in (part.hub, part.folder, root / part.folder):
        assert f"into {part.folder} (" in hub.missing_weights_message([(part, path)])
    assert f"into {tmp_path / 'mine'} (" in hub.missing_weights_message([(part, tmp_path / "mine")])


def test_quiet_loading_restores_the_verbosity():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        with quiet_loading("transformers"):
            assert (
                logging.get_verbosity() == logging.CRITICAL
                and not logging.is_progress_bar_enabled()
            )
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


def test_run_program_prints_errors_without_a_traceback(capsys):
    def work(args: argparse.Namespace) -> int:
        raise ConfigError("no.")

    assert run_program(argparse.ArgumentParser(prog="x"), work, []) == COMMAND_FAILED
    assert capsys.readouterr().err == "x: no.\n"
    with pytest.raises(ConfigError):
        run_program(argparse.ArgumentParser(), work, ["--debug"])


@pytest.mark.parametrize(
    ("module", "extra", "package"),
    [("gradio", "demo", "gradio"), ("cv2", "train", "opencv-python-headless")],
)
def test_run_program_without_an_extra_package(
    capsys,
    module,
    extra,
    package,
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, module, None)  # its import fails

    def work(args: argparse.Namespace) -> int:
        return len(importlib.import_module(module).__name__)

    assert run_program(argparse.ArgumentParser(prog="x"), work, []) == COMMAND_FAILED
    assert capsys.readouterr().err == (
        f"x: the package {package} is not installed, which this needs: "
        f"bash install.sh --extras {extra}, or pip install {package}.\n"
    )
    with pytest.raises(ModuleNotFoundError):
        run_program(argparse.ArgumentParser(), work, ["--debug"])


def test_guarded_formats_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restores it afterwards
    assert run_guarded("seed", False, lambda: 0) == 0
    assert (
        warnings.formatwarning("a.pt: look at it.", SeedWarning, "", 1)
        == "seed: warning: a.pt: look at it.\n"
    )
