"""The conditions of a measurement: hardware, versions, commit, command; kept beside every report and benchmark line."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.device import machine_memory

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow", "safetensors", "sentencepiece")


def circumstances(device: torch.device | str, command: str) -> dict[str, Any]:
    """Hardware, versions, commit, command and date of a measurement."""
    return {"hardware": hardware(device), "versions": versions(), "commit": commit(), "command": command,
            "date": today()}


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, usable cores, torch threads, memory in GiB, and the GPU's name when `device` is one."""
    memory = machine_memory()
    facts: dict[str, Any] = {
        "cpu": _cpu_name(), "cores": _cores(), "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1)}
    place = torch.device(device)
    if place.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(place)
    elif place.type != "cpu":
        facts["gpu"] = place.type
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(folder: str | Path | None = None) -> str:
    """Git commit of the source, with `+changes` when files differ from it; `unknown` outside a repository."""
    where = Path(folder) if folder else Path(__file__).resolve().parent
    try:
        head = _git(where, "rev-parse", "HEAD")
        return head + ("+changes" if _git(where, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(module: str) -> str:
    """The command as typed, for a program run as `python -m module`."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def script_line() -> str:
    """The command as typed, for a program run as `python file.py`."""
    return shlex.join(["python", *sys.argv])


def today() -> str:
    """UTC date and minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
