"""What a run says at its end: what was done, where the files are, which command comes next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from seed_lavis.log import log
from seed_multimodal.config import read_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.progress import duration
from seed_multimodal.training.old.run_log import said_of, utilisation
from seed_multimodal.training.resume import settings_remark

if TYPE_CHECKING:
    from seed_lavis.runner import RunnerSeed

NAMES = {"stage1": "Stage 1 (causal Q-Former)", "stage2": "Stage 2 (codebook)", "seed1-stage2": "SEED-1's stage 2"}

# What changes no number of the training.
SILENT = tuple(f"run.{key}" for key in (
    "output_dir", "resume", "resume_ckpt_path", "log_freq", "save_seconds", "save_every_steps", "keep_checkpoints",
    "num_workers", "tensorboard", "valid_splits", "valid_every_epochs", "valid_batches", "test_splits", "evaluate",
    "batch_size_eval", "peak_tflops", "device", "gpu", "rank", "world_size", "distributed", "dist_url"))


def log_changes(runner: RunnerSeed) -> None:
    """Name the settings in which a run that goes on from its state differs from the one before in its folder."""
    before = Path(runner.output_dir) / "config.yaml"
    if not before.is_file():
        return
    try:
        plain = [OmegaConf.to_container(one) for one in (read_yaml(before), runner.config.config)]
    except ConfigError as error:  # torn when that run was killed; its state says all that is needed
        log(f"[{runner.stage}.state.pt] which settings have changed is not known: {error}")
        return
    remark = settings_remark(plain[0], plain[1], SILENT)
    if remark:
        log(f"[{runner.stage}.state.pt] {remark}.")


def shown(path: str | Path) -> str:
    """A path as it is shortest from here."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def summary(runner: RunnerSeed, record: dict[str, Any], seconds: float) -> list[str]:
    """Lines for the end of a run."""
    options, model = runner.options, runner._model
    # The record's sizes, since a run that was done before may have had others.
    earlier = record.get("begun", 0)  # steps that another run made, before its checkpoint
    own = (record["steps"] - earlier) * record.get("batch_size", options.batch_size_train) * record.get("accumulate", 1)
    samples, spent = own * record.get("processes", 1), float(record.get("seconds", seconds))
    speed = said_of(utilisation(runner.cost, own / spent)) if spent else ""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items()
                        if name.startswith("loss") and isinstance(value, float))
    folder = shown(runner.output_dir)
    lines = [
        f"{NAMES.get(runner.stage, runner.stage)}: {record['steps']:,} steps"
        + (f" ({earlier:,} of them before run.resume_ckpt_path)" if earlier else "")
        + f", {samples:,} pictures in {duration(spent)}{speed}" + (f"; at the end {numbers}." if numbers else "."),
        f"  checkpoint  {shown(record['checkpoint'])}",
        f"  log         {folder}/{runner.stage}.log.jsonl, {folder}/config.yaml",
    ]
    if record.get("bad_samples"):
        lines.append(f"  {record['bad_samples']} unreadable pictures were replaced; the log names them.")
    work = (runner.config.datasets_cfg.get("nano_views") or {}).get("build_info", {}).get("work")
    return [*lines, *(_next_of_speedrun(runner.stage, work) if work else _next(runner.stage, record, model))]


def _next_of_speedrun(stage: str, work: str) -> list[str]:
    if stage == "stage1":
        return [f"Next: python SEED_Tokenizer/train.py --cfg-path {shown(work)}/stage2.yaml"]
    return ["Next: --only tokenizer,codes of python -m seed_multimodal.training.nano (scripts/nano_speedrun.sh goes on "
            "by itself)."]


def _next(stage: str, record: dict[str, Any], model: Any) -> list[str]:
    checkpoint = shown(record["checkpoint"])
    if stage == "stage1":
        nano = "CONFIG=lavis/projects/nano/pretrain_codebook.yaml " if not model.options.load_pretrained else ""
        return [f"Next: {nano}sh train_scripts/codebook.sh --options model.pretrained={checkpoint}"]
    if stage == "stage2":
        first = shown(model.options.pretrained) if model.options.load_pretrained else "STAGE1.pth"
        vision = f" --vision {model.options.vit_weights}" if model.options.vit_weights else ""
        return [f"Next: seed export-tokenizer --stage1 {first} --stage2 {checkpoint}{vision} --out tokenizer"]
    return []
