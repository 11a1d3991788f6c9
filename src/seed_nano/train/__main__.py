"""Train nano, nano-x or nano-lavit from scratch: `python -m seed_nano.train nano --preset pico
--jobs 2`, or a row of a study of tokenizers (`study`, `study-grid`, `study-lavit`).

Stopped stages resume; the last stages evaluate the finished system, which
`MultimodalSystem.from_pretrained` loads from `--out`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf

from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.entry import DONE, bounded_int, run_program
from seed_multimodal.settings import check_keys
from seed_nano.train.pipeline import Pipeline
from seed_nano.train.stages import PIPELINES, used_stages
from seed_nano.train.times import read_runs, wall_seconds
from seed_nano.train.workspace import Workspace, load_settings


def main(arguments: list[str] | None = None) -> int:
    """Parse, run the stages, print a summary; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m seed_nano.train",
        description=__doc__,
        epilog="Further arguments are settings: key=value.",
    )
    parser.add_argument("system", choices=[name.replace("_", "-") for name in PIPELINES])
    parser.add_argument(
        "--preset",
        default="gpu",
        help="pico (minutes), cpu (hours on two cores), record (docs/records.md), gpu (default) or "
        "a YAML file of settings",
    )
    for preset in ("pico", "cpu"):
        parser.add_argument(
            f"--{preset}",
            dest="preset",
            action="store_const",
            const=preset,
            help=f"--preset {preset}",
        )
    parser.add_argument(
        "--work", type=Path, help="checkpoints, caches and logs (default: runs/SYSTEM-PRESET)"
    )
    parser.add_argument("--out", type=Path, help="the finished system (default: WORK/system)")
    parser.add_argument("--only", default="", help="comma-separated stages")
    parser.add_argument(
        "--jobs", type=bounded_int(1), default=1, help="stages that run in parallel (1)"
    )
    # A single stage of another run.
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-report", action="store_true", help="skip the report")
    argv = sys.argv[1:] if arguments is None else arguments
    # Settings may stand anywhere; argparse wants them in one place.
    overrides = [word for word in argv if "=" in word and not word.startswith("-")]
    flags = [word for word in argv if word not in overrides]
    return run_program(parser, partial(_run, overrides), flags, "nano training")


def _run(overrides: Sequence[str], options: argparse.Namespace) -> int:
    system = options.system.replace("-", "_")
    kind, rows = PIPELINES[system]
    stages = {stage.name: stage for stage in rows}
    config = load_settings(system, options.preset, overrides)
    name = Path(options.preset).stem
    work = options.work or Path("runs") / (name if system == "nano" else f"{system}-{name}")
    out = options.out or work / "system"
    # 1. The stages to run.
    wanted = [stage.strip() for stage in options.only.split(",") if stage.strip()]
    check_keys(wanted, stages, "--only")
    if not wanted:
        wanted = list(used_stages(system, config))
        if options.no_report:
            wanted.remove("report")
    # 2. Write the settings, which child processes read.
    with writing(work):
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        replace_text(work / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    child = ["-m", "seed_nano.train", options.system, "--preset", str(work / "config.yaml")]
    child += ["--work", str(work), "--out", str(out), "--child", "--only"]
    # 3. Run the stages.
    space = kind(config, work, out)
    started = time.monotonic()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
    Pipeline(space, stages, options.jobs, child, keep_times=not options.child).run(wanted)
    if not options.child:
        minutes = (time.monotonic() - started) / 60
        hint = f"; try: seed chat --model {out}" if "assemble" in wanted else ""
        print(f"Done in {minutes:.1f} min: {out}{hint}")
        if "report" in wanted and hasattr(config, "target"):
            print(target_line(space))
    return DONE


def target_line(space: Workspace) -> str:
    """Whether the report's captions and drawings reach the target, and after how many minutes."""
    figures = read_json_object(space.out / "report" / "report.json")["splits"]["val"]
    captions, drawings = (figures[name]["all"] for name in ("caption", "drawing"))
    is_reached = min(captions["value"], drawings["value"]) >= space.config.target
    runs = [run for run in read_runs(space.work) if run.stage != "report"]
    return (
        f"Target {space.config.target} {'reached' if is_reached else 'not reached'}: captions "
        f"{captions['value']:.3f}, drawings {drawings['value']:.3f} of val (n {captions['n']}); "
        f"{wall_seconds(runs) / 60:.1f} min of training."
    )


if __name__ == "__main__":
    sys.exit(main())
