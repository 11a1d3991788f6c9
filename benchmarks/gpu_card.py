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
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared import ROOT, start, system_parser

from seed_multimodal.device import choose_device
from seed_multimodal.disk import replace_text, writable_folder
from seed_multimodal.entry import DONE, log_line
from seed_multimodal.errors import ConfigError

PART_SECONDS = 9 * 60  # a part is ended after so long

# Part → minutes on an H100, and the program; device and model are added.
WEIGHTS = "original_layouts.py 8b pretrained"
PARTS = {
    "tokenizer": (2, "tokenizer.py --batches 1 256"),
    "training-llm": (2, "training.py --parts llm --batches 8"),
    "training-tokenizer": (3, "training.py --parts tokenizer --batches 64"),
    "generation": (8, "generation.py --batches 1 64 --prompt 128 --new 128 --repeats 2"),
    "drawing": (6, "drawing.py --batches 8 --steps 20 --repeats 1"),
    "server": (8, "serving.py --clients 1 16 --requests 8"),
}
SMALL_PARTS = {
    "tokenizer": (1, "tokenizer.py --batches 2 --repeats 1"),
    "generation": (1, "generation.py --batches 2 --prompt 16 --new 8 --repeats 1"),
    "drawing": (1, "drawing.py --batches 2 --steps 1 --repeats 1"),
    "training-llm": (1, "training.py --parts llm --batches 2 --repeats 1"),
    "training-tokenizer": (1, "training.py --parts tokenizer --batches 2 --repeats 1"),
    "server": (1, "serving.py --clients 1 2 --requests 2"),
}
# What one H100 should reach: benchmark, variant, batch → a rate.
GOALS = {
    ("tokenizer encode", "graph", 256): 1050,
    ("tokenizer encode", "graph", 1): 143,
    ("generation", "compiled", 1): 195,
    ("generation", "compiled", 64): 5000,
    ("generation", "int8", 1): 300,
    ("reconstruct", "compiled", 1): 3.0,
    ("reconstruct", "fast", 1): 5.5,
    ("training llm", "packed", 8): 17000,
    ("draw", "batch", 1): 1.7,
}
HEAD = ("work", "batch", "variant", "rate", "to plain", "s", "MFU", "peak GiB", "goal (H100)")


def run_part(name: str, command: str, folder: Path) -> None:
    """Run one program; its lines are in `PART.jsonl` if it has succeeded, otherwise in
    `PART.failed`."""
    started = time.monotonic()
    program, *arguments = shlex.split(command)
    with (folder / f"{name}.failed").open("w") as output, (folder / f"{name}.log").open("w") as log:
        try:
            problem = subprocess.run(
                [sys.executable, str(ROOT / "benchmarks" / program), *arguments],
                cwd=folder,  # where `--model 8b` finds its files
                stdout=output,
                stderr=log,
                timeout=PART_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            problem = f"ended after {PART_SECONDS} s"
    if not problem:
        (folder / f"{name}.failed").rename(folder / f"{name}.jsonl")
    log_line(f"{name}: {problem or 'done'}, {time.monotonic() - started:.0f} s")


def row(line: Mapping[str, Any]) -> list[str]:
    """The cells of a line; those of HEAD that it lacks are empty."""
    results = line["results"]
    batch = line.get("batch") or line.get("clients")
    variant = " ".join(filter(None, (line["variant"], line.get("request"))))
    if "error" in results:
        return [line["benchmark"], str(batch), variant, results["error"], *[""] * 5]
    key, rate = next(item for item in results.items() if item[0].endswith("_per_second"))
    goal = GOALS.get((line["benchmark"], line["variant"], batch))
    return [
        line["benchmark"],
        str(batch),
        variant,
        f"{rate:,} {key.removesuffix('_per_second').replace('_', ' ')}/s",
        f"{results['times_plain']} ×" if "times_plain" in results else "",
        str(results.get("seconds", results.get("p50", ""))),
        f"{results['mfu']:.0%}" if results.get("mfu") else "",
        str(results.get("peak_gpu_gib", "")),
        "" if goal is None else f"≥ {goal:,}: {'reached' if rate >= goal else '**missed**'}",
    ]


def page(lines: list[dict[str, Any]], model: str) -> str:
    """The card as Markdown."""
    if not lines:
        return "Nothing was measured.\n"
    first = lines[0]
    weights = "random weights of the published sizes" if model == "original" else model
    machine = first["hardware"] | first["versions"]
    machine_text = ", ".join(f"{name} {value}" for name, value in machine.items())
    runtimes = ", ".join(dict.fromkeys(line["runtime"] for line in lines))
    rows = [HEAD, ["---"] * len(HEAD), *map(row, lines)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return (
        f"# {first['hardware'].get('gpu', first['hardware']['cpu'])}\n\n"
        f"{weights}, {runtimes}; {machine_text}; commit {first['commit']}; "
        f"{first['date']} to {lines[-1]['date']}.\n\n"
        "`plain` is the stock way in the same run: one request after another through "
        "transformers' and diffusers' own classes, or the original's padded training step. `s`: "
        "the median of a call, of the server that of an answer.\n\n"
        f"{table}\n"
    )


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    original = options.model == "original"
    model = "8b" if original else str(Path(options.model).resolve())
    device = choose_device(options.device, options.dtype, log=None).device
    folder = writable_folder(options.out.resolve(), ConfigError)

    # 1. The parts that are missing, as far as the time goes; the page after each.
    missing = []
    lines: list[dict[str, Any]] = []
    flags = f"--device {device} --dtype {options.dtype} --model {shlex.quote(model)}"
    if original and not (folder / "weights.jsonl").is_file():
        run_part("weights", WEIGHTS, folder)
    for name, (minutes, command) in (PARTS if original else SMALL_PARTS).items():
        file = folder / f"{name}.jsonl"
        minutes_left = options.minutes - (time.monotonic() - started) / 60
        if not file.is_file() and minutes <= minutes_left:
            run_part(name, f"{command} {flags}", folder)
        if file.is_file():
            lines += map(json.loads, file.read_text().splitlines())
            # Each part chooses its own precision.
            if len({(line["model"], line["runtime"].split()[0]) for line in lines}) > 1:
                raise ConfigError(f"{file} was made with other flags: name another folder.")
        else:
            missing.append(name)
        replace_text(folder / "card.md", page(lines, options.model))

    # 2. What is left.
    print(f"Wrote {folder / 'card.md'}.")
    if missing:
        log_line(f"Run the same command again for the rest: {', '.join(missing)}.")
    return 1 if missing else DONE


if __name__ == "__main__":
    parser = system_parser(__doc__)
    parser.set_defaults(model="original", device="cuda")
    parser.add_argument("out", type=Path, help="folder of the lines and the page")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="for this call: parts that take longer wait for the next",
    )
    start(run, parser)
