"""Dockerfile, systemd units and start scripts: what they name exists, and what an
image holds is enough to serve.
"""

import configparser
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import requests
from real_processes import run_process
from repository import ROOT
from served import serving

INSTRUCTIONS = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
STEPS = [line.split(maxsplit=1) for line in INSTRUCTIONS if line and line[0] != "#"]
NAMES = [name for name, _ in STEPS]


def arguments(step: str) -> list[str]:
    return [rest for name, rest in STEPS if name == step]


def copied(folder):
    """Make what the COPY steps bring, without what git ignores."""
    for line in arguments("COPY"):
        *sources, target = line.split()
        for source in sources:
            tracked = run_process(["git", "ls-files", source], cwd=ROOT, check=True).stdout
            assert tracked, f"{source} is not in the repository"
            for name in tracked.splitlines():
                within = source if (ROOT / source).is_dir() else Path(name).parent
                target_path = folder / target / Path(name).relative_to(within)
                target_path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target_path)


def test_dockerfile_runs_as_a_user_and_takes_no_secrets():
    # 1. A fixed base, and a user for everything that is served.
    (base,) = arguments("FROM")
    assert NAMES[0] == "FROM" and ":" in base and ":latest" not in base
    last_step = max(index for index, name in enumerate(NAMES) if name in ("RUN", "COPY"))
    assert arguments("USER") == ["seed"] and NAMES.index("USER") > last_step
    # 2. Neither a password nor files that git does not know.
    assert "ADD" not in NAMES
    assert not re.search(r"SEED_TOKEN=|--privileged", "\n".join(rest for _, rest in STEPS))
    first, *ignored = (ROOT / ".dockerignore").read_text().split()
    allowed = {line.removeprefix("!").split("/")[0] for line in ignored if line[0] == "!"}
    sources = {source for line in arguments("COPY") for source in line.split()[:-1]}
    assert first == "*" and sources == allowed


def test_systemd_units_name_scripts_that_exist():
    units = sorted((ROOT / "scripts" / "systemd").glob("*.service"))
    assert len(units) == 2
    for unit in units:
        read = configparser.ConfigParser(interpolation=None, strict=False)
        read.optionxform = str  # type: ignore[assignment,method-assign]
        read.read_string(unit.read_text())
        assert (ROOT / read["Service"]["ExecStart"].split()[1]).is_file()
        assert read["Service"]["User"] == "seed"


@pytest.mark.process
@pytest.mark.parametrize(
    "named, argument",
    [
        ("nano-lavit", "--system nano-lavit --port 7890 --port 1"),
        ("/a/folder", "--system /a/folder --port 7890 --port 1"),
        ("8b", "--model configs/llm/seed_llama_8b_8bit.yaml --quantization int8 --port 7890"),
    ],
)
def test_start_script_starts_any_system(named, argument, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho $*\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = run_process(
        ["bash", str(ROOT / "scripts" / "start_backend.sh"), named, "--port", "1"],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
    )
    assert done.returncode == 0 and argument in done.stdout, done.stderr


@pytest.mark.process
@pytest.mark.nightly
def test_an_image_holds_what_the_backend_needs(tmp_path):
    # The files of the COPY steps in an empty folder, started as CMD does (but on loopback, on a
    # free port).
    copied(tmp_path)
    (command,) = arguments("CMD")
    script, model, *_ = json.loads(command)
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": ""}
    with serving(["bash", script, model, "--port", "0"], cwd=tmp_path, env=env) as (address, _):
        ready = requests.get(address.replace("generate", "ready"), timeout=10)
    assert ready.json() == {"ready": True}
