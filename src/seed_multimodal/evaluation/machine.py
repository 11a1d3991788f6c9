"""Measurement conditions for reports and benchmarks: hardware, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from seed_multimodal.disk import JsonObject

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow", "safetensors", "sentencepiece")


def circumstances(device: torch.device | str, command: str = "") -> JsonObject:
    """Hardware, versions, commit, command and date of a measurement.

    command: empty for the Python command as typed.
    """
    return {
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(),
        "command": command or shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def hardware(device: torch.device | str) -> JsonObject:
    """The hardware that computes on `device`: cpu, cores that this process may use, threads of
    torch, memory_gib, gpu if the device is one; None: the operating system does not tell."""
    # 1. Processor and cores; a container may use fewer than there are.
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        model = re.search(r"(?m)^model name\s*:(.*)$", cpu_info.read_text(encoding="utf-8"))
        cpu = model[1].strip() if model else cpu
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))

    # 2. Memory.
    memory_gib = None
    if hasattr(os, "sysconf"):
        n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory_gib = round(n_bytes / 2**30, 1)

    # 3. The GPU.
    conditions: JsonObject = {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib,
    }
    device = torch.device(device)
    if device.type == "cuda":
        conditions["gpu"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        conditions["gpu"] = device.type
    return conditions


def commit() -> str:
    """Git commit of the source, with `+changes` if files differ; `unknown` without a repository."""

    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], check=True, capture_output=True, text=True
        ).stdout

    try:
        has_changes = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if has_changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
