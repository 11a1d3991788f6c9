"""Dockerfile, compose file and systemd units: what they name exists, and what an image holds is
enough to serve.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from real_processes import run_process
from repository import ROOT

INSTRUCTIONS = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
STEPS = [line.split(maxsplit=1) for line in INSTRUCTIONS if line and line[0] != "#"]


def arguments(step: str) -> list[str]:
    return [rest for name, rest in STEPS if name == step]


def copied(folder: Path) -> None:
    """What the COPY steps bring, without what git ignores."""
    for line in arguments("COPY"):
        *sources, target = line.split()
        for source in sources:
            tracked = run_process(["git", "ls-files", source], cwd=ROOT, check=True)
            assert tracked.stdout, f"{source} is not in the repository"
            for name in tracked.stdout.splitlines():
                within = source if (ROOT / source).is_dir() else Path(name).parent
                target_path = folder / target / Path(name).relative_to(within)
                target_path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target_path)


def test_dockerfile_runs_as_a_user_and_takes_no_secrets():
    names = [name for name, _ in STEPS]
    assert (
        names[0] == "FROM" and ":latest" not in arguments("FROM")[0] and ":" in arguments("FROM")[0]
    )
    assert arguments("USER") == ["seed"] and names.index("USER") > max(
        target_path for target_path, name in enumerate(names) if name in ("RUN", "COPY")
    )
    assert not re.search(
        r"SEED_TOKEN=|--privileged", "\n".join(line for line in INSTRUCTIONS if line[:1] != "#")
    )
    assert "ADD" not in names and all(
        "--no-cache-dir" in run for run in arguments("RUN") if "pip install" in run
    )
    ignored = (ROOT / ".dockerignore").read_text().split()
    allowed = {line.removeprefix("!").split("/")[0] for line in ignored if line.startswith("!")}
    assert (
        ignored[0] == "*"
        and {source for line in arguments("COPY") for source in line.split()[:-1]} == allowed
    )


def test_compose_starts_both_programs_on_loopback_with_a_token():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, script in (("backend", "start_backend.sh"), ("page", "start_frontend.sh")):
        service = services[name]
        assert (
            service["command"][0] == f"scripts/{script}"
            and (ROOT / service["command"][0]).is_file()
        )
        assert (
            service["environment"]["SEED_TOKEN"].startswith("${SEED_TOKEN:?")
            and service["read_only"]
        )
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert services["page"]["command"][-1] == "http://backend:7890/generate"


@pytest.mark.parametrize(
    "unit", sorted((ROOT / "scripts" / "systemd").glob("*.service")), ids=lambda path: path.stem
)
def test_systemd_units_name_scripts_that_exist(unit):
    read = configparser.ConfigParser(interpolation=None, strict=False)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string(unit.read_text())
    assert (ROOT / read["Service"]["ExecStart"].split()[1]).is_file() and read["Service"][
        "User"
    ] == "seed"


@pytest.mark.process
@pytest.mark.slow
def test_an_image_holds_what_the_backend_needs(tmp_path):
    """The files of the COPY steps in an empty folder, started as CMD does (but on loopback, on a
    free port).
    """
    copied(tmp_path)
    (command,) = arguments("CMD")
    script, model, *_ = json.loads(command)
    started = subprocess.Popen(
        ["bash", script, model, "--port", "0"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": ""},
    )
    assert started.stdout is not None
    try:
        line = next(line for line in started.stdout if "answering at" in line)
        address = line.split("answering at ")[1].split()[0].replace("generate", "ready")
        assert json.load(urllib.request.urlopen(address, timeout=10)) == {"ready": True}
    finally:
        started.terminate()
        assert started.wait(30) == 0
