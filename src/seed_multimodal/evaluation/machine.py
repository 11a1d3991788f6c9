"""Measurement conditions for reports and benchmarks: hardware, versions, commit, command."""

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

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow", "safetensors", "sentencepiece")


def circumstances(device: torch.device | str, command: str = "") -> dict[str, Any]:
    """Hardware, versions, commit, `command` (else the Python command as typed) and date of a measurement."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "command": command or shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, usable cores, torch threads, memory in GiB, and the GPU's name when `device` is one."""
    info, place = Path("/proc/cpuinfo"), torch.device(device)
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    )
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
    }
    if place.type != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def commit(folder: str | Path = Path(__file__).parent) -> str:
    """Git commit of the source, with `+changes` when files differ from it; `unknown` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
