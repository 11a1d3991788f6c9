"""One page about a GPU: every benchmark at the published sizes, each with the plain stack.

    bash benchmarks/gpu_card.sh OUT                                       one H100 or A100
    bash benchmarks/gpu_card.sh CPU --device cpu --model pretrained/nano  the same on a CPU

The parts are processes of less than nine minutes each. OUT receives the lines of each part
(`PART.jsonl`), the page, `card.md`, after each of them, and 22 GB of random weights in
`pretrained/`. A part that has succeeded is not run again, so that a card can be made in several
calls with the same flags: `--minutes 10` starts no part that takes longer than that on an H100. It
needs the extras demo and train.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import ROOT, base_parser, rounded, start

from seed_multimodal.device import choose_device
from seed_multimodal.disk import replace_text, writable_folder
from seed_multimodal.entry import DONE, ended_by_sigterm, log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate_system

PART_SECONDS = 9 * 60  # a part is ended after so long
MODULES = ("torchao", "peft", "flask", "waitress", "prometheus_client")  # of extras
WEIGHTS_GB = 22  # of system-files

# Part → minutes on an H100, and the command. Names in braces are of SIZES.
#
# A program prints JSON lines with `benchmark`, `variant` and what `shared.print_line` adds to every
# line. `results` has `UNIT_per_second`, and `seconds` or `p50`; or `error`. Cells are empty without
# `batch` (or `clients`), `request`; in `results`, `times_plain`, `mfu`, `weight_gb_per_second` (the
# share of `copy`'s rate), `peak_gpu_gib`.
PARTS = {
    "ceilings": (1, "ceilings.py {device} --side {side} {repeats}"),
    "tokenizer": (4, "tokenizer.py {device} {model} --batches {encoded} {repeats}"),
    "generation": (
        6,
        "generation.py {device} {model} --variants plain engine compiled "
        "--batches {prompts} {text} {repeats}",
    ),
    "generation-int8": (
        3,
        "generation.py {device} {model} --variants plain int8 --batches 1 {text} {repeats}",
    ),
    "decoder": (5, "drawing.py {device} {model} --batches {drawn} --steps {steps} {repeats}"),
    "training-llm": (6, "training.py {device} {model} --parts llm --batches {rows} {repeats}"),
    "training-tokenizer": (
        4,
        "training.py {device} {model} --parts tokenizer --batches {images} {repeats}",
    ),
    "system-files": (3, "original_layouts.py 8b pretrained"),
    "system": (
        5,
        "drawing.py {device} --model {system} --batches {drawn} --steps {steps} {repeats}",
    ),
    "server": (5, "serving.py {device} --model {system} --clients {clients} --requests {requests}"),
}
ORIGINAL_ONLY = ("decoder", "system-files")  # a folder's decoder is timed as a part of its system
SIZES = {
    "original": {
        "side": "8192",
        "encoded": "1 32 256",
        "prompts": "1 16 64",
        "text": "--prompt 128 --new 128",
        "drawn": "1 8",
        "steps": "20",
        "rows": "8",
        "images": "64",
        "clients": "1 8 32",
        "requests": "32",
        "repeats": "",
    },
    "small": {
        "side": "512",
        "encoded": "2",
        "prompts": "2",
        "text": "--prompt 16 --new 8",
        "drawn": "2",
        "steps": "1",
        "rows": "2",
        "images": "2",
        "clients": "1 2",
        "requests": "2",
        "repeats": "--repeats 1",
    },
}


@dataclass(frozen=True)
class Goal:
    """What one H100 is expected to reach in a line: a rate at least, or seconds at most."""

    benchmark: str
    variants: tuple[str, ...]
    batch: int
    per_second: float | None = None
    seconds: float | None = None

    def is_of(self, line: Mapping[str, Any]) -> bool:
        names = line["benchmark"], line.get("batch")
        return names == (self.benchmark, self.batch) and line.get("variant") in self.variants

    def text(self, results: Mapping[str, Any]) -> str:
        """The goal, and whether the line reaches it; empty if the line lacks the figure."""
        _, value = rate(results)
        seconds = results.get("seconds")
        if self.per_second is not None and value is not None:
            goal = f"≥ {self.per_second:,}"
            reached = value >= self.per_second
        elif self.seconds is not None and seconds is not None:
            goal = f"≤ {self.seconds} s"
            reached = seconds <= self.seconds
        else:
            return ""
        return f"{goal}: {'reached' if reached else '**missed**'}"


GOALS = (
    Goal("tokenizer encode", ("compiled", "graph"), 256, per_second=1050),
    Goal("tokenizer encode", ("compiled", "graph"), 1, seconds=0.007),
    Goal("generation", ("compiled",), 1, per_second=195),
    Goal("generation", ("compiled",), 64, per_second=5000),
    Goal("generation", ("int8",), 1, per_second=300),
    Goal("reconstruct", ("compiled",), 1, seconds=0.33),
    Goal("reconstruct", ("fast",), 1, seconds=0.18),
    Goal("training llm", ("packed", "compiled", "kept"), 8, per_second=17000),
    Goal("draw", ("batch",), 1, seconds=0.6),
)


def run_part(name: str, command: str, folder: Path) -> None:
    """Run one program; its lines are in `PART.jsonl` when it has ended.

    A program that fails or takes too long leaves the lines that it has printed, and one with the
    error.
    """
    started = time.monotonic()
    unfinished = folder / f"{name}.unfinished"
    words = shlex.split(command)
    with (
        unfinished.open("w") as output,
        (folder / f"{name}.log").open("w") as log,
        ended_by_sigterm(),
    ):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]],
            cwd=folder,  # where `--model 8b` finds its files
            stdout=output,
            stderr=log,
            start_new_session=True,
        )
        problem = f"ended after {PART_SECONDS} s"
        try:
            problem = f"exit status {code}" if (code := process.wait(PART_SECONDS)) else ""
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also its server.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if problem:
            last = (folder / f"{name}.log").read_text().strip().split("\n")[-1].replace("|", "/")
            error = f"{problem}, {last[:200] or 'silently'} ({name}.log)"
            output.write(
                json.dumps({"benchmark": name, "variant": "", "results": {"error": error}}) + "\n"
            )
    unfinished.rename(folder / f"{name}.jsonl")
    log_line(f"{name}: {problem or 'done'}, {time.monotonic() - started:.0f} s")


def rate(results: Mapping[str, Any]) -> tuple[str, float | None]:
    """Unit and value of a line's rate; None: it has none."""
    for key, value in results.items():
        if key.endswith("_per_second") and "weight" not in key:
            return f"{key.removesuffix('_per_second').replace('_', ' ')}/s", value
    return "", None


def row(line: Mapping[str, Any], copied: float | None) -> list[str]:
    """A line's cells. `copied`: gigabytes that the device copies a second."""
    results = line["results"]
    variant = line.get("variant") or "–"
    if line.get("request"):
        variant = f"{variant}, {line['request']}"
    what = [line["benchmark"], str(line.get("batch") or line.get("clients") or "–"), variant]
    if "error" in results:
        return [*what, results["error"], "", "", "", "", ""]
    unit, value = rate(results)
    # The share of what the device can do: of its arithmetic, or of its memory's speed.
    share = ""
    if results.get("mfu"):
        share = f"MFU {results['mfu']:.0%}"
    elif copied and "weight_gb_per_second" in results:
        share = f"bandwidth {results['weight_gb_per_second'] / copied:.0%}"
    ratio = results.get("times_plain")  # none if `plain` has failed
    goal = next((goal.text(results) for goal in GOALS if goal.is_of(line)), "")
    seconds = results.get("seconds", results.get("p50"))
    return [
        *what,
        "" if value is None else f"{value:,} {unit}",
        f"{ratio} ×" if ratio and variant != "plain" else "",
        "" if seconds is None else str(rounded(seconds)),
        share,
        str(results.get("peak_gpu_gib", "")),
        goal,
    ]


def page(lines: Mapping[str, list[dict[str, Any]]], model: str) -> str:
    """The card as Markdown."""
    # 1. What it was measured on and with.
    measured = [line for part in lines.values() for line in part if "hardware" in line]
    if not measured:
        return "Nothing was measured.\n"
    first = measured[0]
    original = model == "original"
    weights = "random weights of the published sizes" if original else model
    hardware = ", ".join(f"{name} {value}" for name, value in first["hardware"].items())
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    dates = f"{first['date']} to {measured[-1]['date']}"
    # 2. The table; shares of the memory's speed count from the measured copy.
    copied = next(
        (
            line["results"].get("gigabytes_per_second")
            for line in lines.get("ceilings", [])
            if line["benchmark"] == "ceiling copy"
        ),
        None,
    )
    head = ["work", "batch", "variant", "rate", "to plain", "s", "share", "peak GiB"]
    rows: Iterable[list[str]] = (
        row(line, copied) for content in lines.values() for line in content
    )
    if original:
        head.append("goal (one H100)")
    table = "\n".join(
        f"| {' | '.join(cells[: len(head)])} |" for cells in [head, ["---"] * len(head), *rows]
    )
    return (
        f"# {first['hardware'].get('gpu', first['hardware']['cpu'])}\n\n"
        f"{weights}, {first['runtime']}; {hardware}; {versions}; commit {first['commit']}; "
        f"{dates}.\n\n"
        "`plain` is the stock way in the same run: one request after another through "
        "transformers' and diffusers' own classes, or the original's padded training step. `s`: "
        "the median of a call, of the server that of an answer.\n\n"
        f"{table}\n"
    )


def check_machine(folder: Path, original: bool) -> None:
    """Raise ConfigError for what would make late parts fail."""
    missing = [module for module in MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not installed: bash install.sh --extras demo,train."
        )
    free_gb = shutil.disk_usage(folder).free / 1e9
    is_written = (folder / "system-files.jsonl").is_file()
    if original and not is_written and free_gb < WEIGHTS_GB:
        raise ConfigError(f"{folder}: {WEIGHTS_GB} GB are needed, {free_gb:.1f} GB are free.")


def check_settings(folder: Path, settings: str) -> None:
    """Write the flags into the folder. Raises ConfigError: it has parts made with others."""
    file = folder / "settings.txt"
    earlier = file.read_text() if file.is_file() else settings
    if earlier != settings:
        raise ConfigError(f"{folder} has parts made with {earlier}: name another folder.")
    replace_text(file, settings)


def read_parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the parts that have ended."""
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in PARTS
        if (folder / f"{name}.jsonl").is_file()
    }


def failed(lines: Iterable[Mapping[str, Any]]) -> bool:
    return any("error" in line["results"] for line in lines)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    original = options.model == "original"
    system = None if original else locate_system(options.model)
    if not original and system is None:
        raise ConfigError(f"{options.model}: no such folder.")
    model = options.model if system is None else str(system.resolve())
    device = choose_device(options.device, options.dtype, log=None).device
    folder = writable_folder(options.out.resolve(), ConfigError)
    check_machine(folder, original)
    check_settings(folder, f"--model {model} --device {device} --dtype {options.dtype}")
    values = {
        **SIZES["original" if original else "small"],
        "device": f"--device {device} --dtype {options.dtype}",
        "model": f"--model {shlex.quote(model)}",
        "system": "8b" if original else shlex.quote(model),
    }

    # 1. The parts that are missing, then those that failed earlier, as far as the time goes, and
    # the page after each.
    wanted = [name for name in PARTS if original or name not in ORIGINAL_ONLY]
    lines = read_parts(folder)
    missing = [name for name in wanted if name not in lines]
    again = [name for name in lines if failed(lines[name])]
    for name in [*missing, *again]:
        minutes, command = PARTS[name]
        left = options.minutes - (time.monotonic() - started) / 60
        if minutes <= left:
            run_part(name, command.format_map(values), folder)
            replace_text(folder / "card.md", page(read_parts(folder), options.model))

    # 2. The page of all.
    lines = read_parts(folder)
    replace_text(folder / "card.md", page(lines, options.model))
    missing = [name for name in wanted if name not in lines]
    if missing:
        log_line(f"Run the same command again for the rest: {', '.join(missing)}.")
    print(f"Wrote {folder / 'card.md'}.")
    return 1 if any(map(failed, lines.values())) else DONE


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.set_defaults(model="original", device="cuda")
    parser.add_argument("out", type=Path, help="folder of the lines and the page")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="for this call: parts that take longer wait for the next",
    )
    start(run, parser)
