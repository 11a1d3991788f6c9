"""Names of released weights, and other libraries kept quiet."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from seed_multimodal import hub
from seed_multimodal.entry import REFUSED, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.progress import quiet_loading


def test_what_a_hub_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("AILab-CVC/seed-tokenizer-2", Path("owner/name")):
        assert hub.is_hub_name(name)
    for name in ("pretrained/nano", "mine/words", "./here", "../there", "~/home", "/a/b", "a/b/c", "nano", "owner/"):
        assert not hub.is_hub_name(name), name


def test_original_parts_have_one_place_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.released_folder("AILab-CVC/seed-llama-8b-sft") == "pretrained/seed_llama_8b_sft"
    assert hub.released_folder("stabilityai/stable-diffusion-xl-base-1.0") == "pretrained/stable-diffusion-xl-base-1.0"
    assert hub.released_folder("owner/name") == "owner/name"
    assert hub.locate_system("NANO") == hub.locate("pretrained/nano")
    monkeypatch.chdir(tmp_path)
    assert (hub.locate("pretrained/nano") or Path()).is_dir()  # from the repository's root
    assert hub.locate("no/such/folder") is None


def test_fetch_takes_one_copy_of_the_weights_and_none_of_subfolders(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    def download(hub_id: str, **patterns: list[str]) -> str:
        for name in filter_repo_objects(files[hub_id], **patterns):
            (tmp_path / hub_id / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / hub_id / name).touch()
        return str(tmp_path / hub_id)

    files = {"both": ["config.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors"],
             "torch": ["config.json", "pytorch_model.bin"], "parts": ["unet/config.json", "vae/config.json", "a.json"]}
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for hub_id, patterns, expected in (("both", hub.WEIGHTS, files["both"][:2]), ("torch", hub.WEIGHTS, files["torch"]),
                                       ("parts", ["vae", "vae/*"], ["vae/config.json"])):
        folder = hub.fetch(hub_id, patterns)
        assert sorted(str(one.relative_to(folder)) for one in folder.rglob("*.*")) == sorted(expected)


def test_quiet_libraries_speak_again_afterwards() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        with quiet_loading("transformers"):
            assert logging.get_verbosity() == logging.CRITICAL and not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


def test_a_program_refuses_in_one_sentence_unless_it_is_debugged(capsys: pytest.CaptureFixture[str]) -> None:
    def work(args: argparse.Namespace) -> int:
        raise ConfigError("no.")

    assert run_program(argparse.ArgumentParser(prog="x"), work, []) == REFUSED
    assert capsys.readouterr().err == "x: no.\n"
    with pytest.raises(ConfigError):
        run_program(argparse.ArgumentParser(), work, ["--debug"])


@pytest.mark.parametrize(("module", "extra", "package"), [
    ("gradio", "demo", "gradio"), ("cv2", "train", "opencv-python-headless")])
def test_a_package_that_is_not_installed_is_one_sentence(capsys: pytest.CaptureFixture[str], module: str, extra: str,
                                                         package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that there is none

    def work(args: argparse.Namespace) -> int:
        return len(importlib.import_module(module).__name__)

    assert run_program(argparse.ArgumentParser(prog="x"), work, []) == REFUSED
    assert capsys.readouterr().err == (f"x: the package {package} is not installed, which this needs: "
                                       f"bash install.sh --extras {extra}, or pip install {package}.\n")
    with pytest.raises(ModuleNotFoundError):
        run_program(argparse.ArgumentParser(), work, ["--debug"])


@pytest.mark.process
def test_a_program_says_warnings_as_sentences() -> None:
    work = ("import warnings; from seed_multimodal import entry, errors\n"
            "entry.guarded('seed', False, lambda: warnings.warn('a.pt: look at it.', errors.SeedWarning) or 0)")
    run = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert run.stderr == "seed: warning: a.pt: look at it.\n"
