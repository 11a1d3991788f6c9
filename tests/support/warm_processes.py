"""`PYTHON`: Python processes that start at once (`warm/`), for commands whose test is not about a
fresh process. Those that are use `sys.executable`."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from repository import ROOT

WARM = Path(__file__).parent / "warm"
FOLDER = "WARM_PYTHON"  # variable: shared by the workers of a run
OWNER = "WARM_PYTHON_OWNER"  # the process with which the server ends


def prepare() -> None:
    """The folder of a run, before its workers start."""
    if FOLDER not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
        os.environ[FOLDER] = str(folder)
        os.environ[OWNER] = str(os.getpid())
        atexit.register(remove, folder, os.getpid())
        (folder / "bin").mkdir()
        python = folder / "bin" / "python"
        python.write_text(f"#!{sys.executable} -IS\n{(WARM / 'python').read_text()}")
        python.chmod(0o755)


def remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # no fork of it
        shutil.rmtree(folder, ignore_errors=True)


def start() -> None:
    """Start the server, once a run; commands wait until it has imported the libraries."""
    folder = Path(os.environ[FOLDER])
    try:
        (folder / "started").mkdir()
    except FileExistsError:
        return
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    log = (folder / "server.log").open("w")
    command = [sys.executable, str(WARM / "server.py"), str(folder), os.environ[OWNER]]
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")
    state = {"pid": server.pid, "path": str(ROOT / "src"), "environment": environment}
    (folder / "server.json.new").write_text(json.dumps(state))
    (folder / "server.json.new").rename(folder / "server.json")


prepare()
PYTHON = str(Path(os.environ[FOLDER], "bin", "python"))
