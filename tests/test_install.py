"""`install.sh` as it runs: real environments, real pip, an index and find-links on loopback with tiny wheels.

The wheels are stand-ins of a few hundred kilobytes, since the real ones weigh gigabytes; nothing else is replaced. Any
address but this machine's is refused by a proxy that is not there.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "seed-multimodal"
version = "1"
"""
BACKEND = '''
import pathlib, zipfile

FILES = {"seed.pth": str(pathlib.Path(__file__).parent / "src"),
         "seed_multimodal-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: seed-multimodal\\nVersion: 1\\n",
         "seed_multimodal-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
         "seed_multimodal-1.dist-info/RECORD": ""}

def build_editable(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(pathlib.Path(folder) / "seed_multimodal-1-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    return "seed_multimodal-1-py3-none-any.whl"
'''


def torch_wheel(folder: Path, version: str, tag: str) -> None:
    """A stand-in of torch, with the two other packages that the script imports at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-{tag}.whl", "w") as wheel:
        for module in ("torch", "torchvision", "transformers"):
            wheel.writestr(f"{module}.py", f"__version__ = {version!r}\n")
        wheel.writestr("torch_weight.bin", random.Random(0).randbytes(400_000))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def repository(tmp_path) -> Path:
    """The script in a repository without dependencies."""
    place = tmp_path / "repository"
    (place / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "install.sh", place)
    shutil.copy(ROOT / "scripts" / "environment.sh", place / "scripts")
    (place / "pyproject.toml").write_text(PROJECT)
    (place / "backend.py").write_text(BACKEND)
    package = place / "src" / "seed_multimodal"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "torchvision_shim.py").write_text("def install(): ...\n")
    return place


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str]]:
    """A folder (`links`, and `simple/torch`) and its address."""
    folder = tmp_path / "served"
    (folder / "links").mkdir(parents=True)
    (folder / "simple" / "torch").mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def environment(tmp_path: Path, address: str, pythons: dict[str, str]) -> dict[str, str]:
    """PATH with these Pythons alone before the system's, no GPU, pip with this index and these find-links."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, path in pythons.items():
        (programs / name).symlink_to(path)
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (programs / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{address}/simple", "PIP_FIND_LINKS": f"{address}/links/", "PIP_NO_CACHE_DIR": "1",
            "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1", "TERM": "xterm", "COLUMNS": "100"}


def real_pythons() -> dict[str, str]:
    """Version -> a Python of this machine that the script may take."""
    found: dict[str, str] = {}
    places = [sys.base_prefix + "/bin", *os.environ["PATH"].split(":"),
              *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    for place in places:
        for minor in range(11, 15):
            path = Path(place) / f"python3.{minor}"
            if f"3.{minor}" not in found and path.exists() and "shims" not in place:
                works = subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True)
                if works.returncode == 0:
                    found[f"3.{minor}"] = str(path.resolve())
    return found


@pytest.mark.process
@pytest.mark.slow
def test_of_several_pythons_one_with_a_cpu_build_of_torch_is_taken(tmp_path, repository, served):
    pythons = real_pythons()
    if len(pythons) < 2:
        pytest.skip("needs two Pythons of 3.11 or newer")
    first, other = sorted(pythons, key=lambda version: int(version[2:]), reverse=True)[:2]
    folder, address = served
    tag = f"cp{other.replace('.', '')}"
    torch_wheel(folder / "links", "2.13.0+cpu", f"{tag}-{tag}-manylinux_2_28_{os.uname().machine}")
    torch_wheel(folder / "simple" / "torch", "2.15.0", "py3-none-any")
    variables = environment(tmp_path, address, {"python3": pythons[first], f"python{other}": pythons[other]})
    done = subprocess.run(["bash", "install.sh"], cwd=repository, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch has a CPU build for python{other}, but none for Python {first}" in done.stdout
    assert "Python imports torch 2.13.0+cpu" in done.stdout
    made = subprocess.run([repository / ".venv" / "bin" / "python", "--version"], capture_output=True, text=True)
    assert made.stdout.startswith(f"Python {other}.")
    assert re.search(r"Downloading \S*torch-2\.13\.0\S* \(\d+.*[kM]B\)", done.stdout), done.stdout  # in a log, too


@pytest.mark.process
@pytest.mark.slow
def test_the_large_build_shows_its_size_and_a_progress_bar(tmp_path, repository, served):
    folder, address = served
    torch_wheel(folder / "simple" / "torch", "2.15.0", "py3-none-any")
    torch_wheel(folder / "links", "1.13.1+cpu", "py3-none-any")  # too old to be the CPU build
    python = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}").resolve())
    variables = environment(tmp_path, address, {"python3": python})
    screen, terminal = pty.openpty()
    child = subprocess.Popen(["bash", "install.sh"], cwd=repository, env=variables, stdin=terminal, stdout=terminal,
                             stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(screen, 65536):
            seen += piece
    os.close(screen)
    text = seen.decode(errors="replace")
    assert child.wait() == 0, text
    announced, _, after = text.partition("about 3 GB to download")
    assert "no CPU build" in announced and "Downloading" not in announced
    assert re.search(r"Downloading \S*torch-2\.15\.0\S* \(\d+.*[kM]B\)", after) and "━━━" in after, text


@pytest.mark.process
def test_what_cannot_be_installed_is_one_sentence_and_changes_nothing(tmp_path, repository, served):
    """pip only warns of an extra that there is none of, and reports a folder of another user's as a bug of Python's."""
    shutil.copy(ROOT / "pyproject.toml", repository)
    variables = environment(tmp_path, served[1], {"python3": sys.executable, "id": shutil.which("id") or ""})

    def said(*options: str) -> str:
        run = subprocess.run(["bash", "install.sh", *options], cwd=repository, env=variables, capture_output=True,
                             text=True)
        assert run.returncode == 1 and not (repository / ".venv").exists(), run.stdout + run.stderr
        return run.stderr

    names = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert said("--extras", "demo, dem") == f"[install] there is no extra dem: use {names}.\n"
    script = (repository / "install.sh").read_text()
    (repository / "install.sh").write_text(script.replace("[ -w", "[ ! -w"))  # the tests may run as root
    assert "cannot be written by" in said() and "take a clone of your own" in said("--extras", "demo")


@pytest.mark.process
@pytest.mark.slow
def test_the_extra_lavis_brings_lavis_however_it_is_asked_for(tmp_path, repository, served):
    """After `--extras lavis` alone, `--lavis` said that all was there already."""
    folder, address = served
    torch_wheel(folder / "links", "2.13.0+cpu", "py3-none-any")
    info = "salesforce_lavis-1.0.2.dist-info"
    with zipfile.ZipFile(folder / "links" / "salesforce_lavis-1.0.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lavis/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: salesforce-lavis\nVersion: 1.0.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (repository / "pyproject.toml").write_text(PROJECT + "[project.optional-dependencies]\nlavis = []\n")
    python = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}").resolve())
    done = subprocess.run(["bash", "install.sh", "--extras", "lavis"], cwd=repository, capture_output=True, text=True,
                          env=environment(tmp_path, address, {"python3": python}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "salesforce-lavis 1.0.2, without its dependencies" in done.stdout
    assert subprocess.run([repository / ".venv" / "bin" / "python", "-c", "import lavis"]).returncode == 0
