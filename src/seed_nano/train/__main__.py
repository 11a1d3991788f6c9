"""Train the parts of nano from scratch: `python -m seed_nano.train --config configs/nano/pico.yaml`.

The tokenizer's two training stages run through the LAVIS application, between `recipe` and `tokenizer`; the language
model's two through MultiModalLLM, between `records` and `llm`; scripts/nano_speedrun.sh does it all. Stages run in
order and each continues where it stopped; `--only` picks some, so that independent ones can run side by side. At the
end `--out` is a system folder that `SeedLlama.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import folder_lock, writing
from seed_multimodal.entry import run_program
from seed_multimodal.errors import ConfigError, SeedError
from seed_nano.train.assemble import assemble
from seed_nano.train.clip import ClipTask
from seed_nano.train.config import NanoConfig, load_settings, save_config
from seed_nano.train.llm_recipe import install_llm, records
from seed_nano.train.task import NanoTask
from seed_nano.train.tokenizer import pool_codes
from seed_nano.train.tokenizer_recipe import join_stages, recipe
from seed_nano.train.unet import UnetOfCodesTask, UnetTask
from seed_nano.train.vae import VaeTask
from seed_nano.train.workspace import Workspace


def trained(kind: Callable[[Any], NanoTask]) -> Callable[[Any], dict[str, Any]]:
    """A stage that the training loop runs."""
    def run(space: Any) -> dict[str, Any]:
        return kind(space).train()

    return run


@dataclass(frozen=True)
class Line:
    """The stages of one system.

    Attributes:
        name: of the package and of the folder of its settings; description: what `--help` says.
        settings, space: the classes of its settings and of its workspace.
        stages: name -> what runs it. built_on: stage -> (a training that was done before it or is done in it, what that
            was built on).
    """

    name: str
    description: str
    settings: type[Any]
    space: type[Workspace]
    stages: Mapping[str, Callable[[Any], dict[str, Any]]]
    built_on: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]


def _codes(space: Workspace) -> dict[str, Any]:
    return {"scenes": len(pool_codes(space))}


NANO = Line(
    "nano", str(__doc__), NanoConfig, Workspace,
    {"vae": trained(VaeTask), "clip": trained(ClipTask), "recipe": recipe, "tokenizer": join_stages, "codes": _codes,
     "unet": trained(UnetTask), "unet2": trained(UnetOfCodesTask),
     "records": records, "llm": install_llm, "assemble": assemble},
    {"unet": (("unet", ("vae", "clip")),), "unet2": (("unet2", ("unet", "tokenizer")),),
     "tokenizer": (("stage1", ("clip",)), ("stage2", ("stage1",))),
     "records": (("llm_pretrain", ("tokenizer",)), ("llm_sft", ("tokenizer",)))})


def main(arguments: list[str] | None = None, line: Line = NANO) -> int:
    """Parse, run the stages, print a summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m seed_multimodal.training.{line.name}",
                                     description=line.description)
    parser.add_argument("--config", default=f"configs/{line.name}/pico.yaml",
                        help=f"settings (configs/{line.name}/*.yaml)")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{line.name}"), help="states, caches and logs")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{line.name}/system"), help="the finished system")
    parser.add_argument("--only", default="", help=f"comma-separated stages out of {', '.join(line.stages)}")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("overrides", nargs="*", help="dotted settings such as seed=1")
    return run_program(parser, partial(_run, line), arguments, f"{line.name} training")


def _run(line: Line, options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    config = load_settings(line.settings, options.config, options.overrides)
    wanted = [stage for part in options.only.split(",") if (stage := part.strip())] or list(line.stages)
    unknown = [s for s in wanted if s not in line.stages]
    if unknown:
        raise SeedError(f"Unknown stage {unknown[0]!r}: use {', '.join(line.stages)}.")
    if options.work.resolve().is_relative_to(options.out.resolve()):
        raise ConfigError(f"--out {options.out}: holds the work folder, whose checkpoints are no part of the system; "
                          "choose another folder, such as one in the work folder.")
    for folder in (options.work, options.out):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):  # now, not when the first stage is trained
            raise SeedError(f"{folder}: this folder cannot be written.")
    with writing(options.work):
        save_config(config, options.work / "config.yaml")
    space = line.space(config, options.work, options.out)
    started = time.monotonic()
    found = []
    for stage in filter(wanted.__contains__, line.stages):
        print(f"== {stage}", flush=True)
        _tell_older(line, space, stage)
        with folder_lock(options.work, SeedError, f"at stage {stage} in this work folder", 3.0, f".{stage}.lock"):
            found.append((stage, line.stages[stage](space)))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} min; the system is in {options.out}.")
    for stage, record in found:
        print(f"  {stage:9s} {record.get('seconds', 0):7.0f} s  " + ", ".join(
            f"{k} {v}" for k, v in record.items() if k not in ("stage", "seconds", "steps", "batch_size")))
    return 0


def _tell_older(line: Line, space: Workspace, stage: str) -> None:
    """Say which trainings are older than what they were built on."""
    for training, parts in line.built_on.get(stage, ()):
        record = space.record(training)
        since = space.newer(record, *parts) if record.is_file() else ""
        if since:
            print(f"[{training}] was trained before {since} was trained again; remove its record and checkpoints "
                  f"(docs/nano-training.md) to train it again: {record}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
