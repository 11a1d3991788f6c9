"""The summary at the end of a run: steps, speed, files, and the command that comes next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_lavis.context import RunContext
from seed_lavis.cost import sample_cost
from seed_lavis.options import locate
from seed_multimodal.hub import PARTS
from seed_multimodal.language.tokenizer_files import MODEL
from seed_multimodal.progress import duration
from seed_multimodal.tokenizers.lavit_training import REFERENCE
from seed_multimodal.training.meter import utilisation, utilisation_text

NAMES = {"stage1": "Stage 1 (causal Q-Former)", "stage2": "Stage 2 (codebook)", "seed1-stage2": "SEED-1's stage 2",
         "lavit-stage1": "LaVIT's stage 1 (tokenizer)"}

def short_path(path: str | Path) -> str:
    """A path as it is shortest from here."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def summary(run: RunContext, record: dict[str, Any]) -> list[str]:
    """Lines for the end of a run."""
    earlier = record.get("begun", 0)  # steps that another run made, before its checkpoint
    own = (record["steps"] - earlier) * record["batch_size"] * record.get("accumulate", 1)
    samples, spent = own * record.get("processes", 1), float(record["seconds"])
    speed = utilisation_text(utilisation(sample_cost(run), own / spent)) if spent else ""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items()
                        if name.startswith("loss") and isinstance(value, float))
    folder = short_path(run.folder)
    lines = [
        f"{NAMES.get(run.stage, run.stage)}: {record['steps']:,} steps"
        + (f" ({earlier:,} of them before run.resume_ckpt_path)" if earlier else "")
        + f", {samples:,} pictures in {duration(spent)}{speed}" + (f"; at the end {numbers}." if numbers else "."),
        f"  checkpoint  {short_path(record['checkpoint'])}",
        f"  log         {folder}/{run.stage}.log.jsonl, {folder}/config.yaml",
    ]
    if record.get("bad_samples"):
        lines.append(f"  {record['bad_samples']} samples that cannot be used were replaced; the log names them.")
    of_nano = all((run.folder.parent / name).is_file() for name in ("config.yaml", "stage2.yaml"))
    return [*lines, *(_next_of_speedrun(run) if of_nano else _next(run, record))]


def _next_of_speedrun(run: RunContext) -> list[str]:
    """Of a run whose YAML `training.nano` has written into its work folder."""
    if run.stage == "stage1":
        return [f"Next: python SEED_Tokenizer/train.py --cfg-path {short_path(run.folder.parent / 'stage2.yaml')}"]
    return ["Next: --only tokenizer,codes of python -m seed_multimodal.training.nano (scripts/nano_speedrun.sh does "
            "it by itself)."]


def _next(run: RunContext, record: dict[str, Any]) -> list[str]:
    checkpoint, options = short_path(record["checkpoint"]), run.model.options
    if run.stage == "stage1":
        nano = "CONFIG=lavis/projects/nano/pretrain_codebook.yaml " if not options.load_pretrained else ""
        return [f"Next: {nano}sh train_scripts/codebook.sh --options model.pretrained={checkpoint}"]
    if run.stage == "lavit-stage1":
        vision = short_path(locate(options.vit_weights)) if options.vit_weights else "TOWER"
        return [f"Next: seed export-tokenizer --lavit {checkpoint} --vision {vision} --out tokenizer",
                f"  the released tokenizer is said to have ended at loss_cosine {REFERENCE}."]
    stage1 = locate(str(options.pretrained)) if options.load_pretrained else "STAGE1.pth"
    vision = f" --vision {short_path(locate(str(options.vit_weights)))}" if options.vit_weights else ""
    export = f"Next: seed export-tokenizer --stage1 {short_path(stage1)} --stage2 {checkpoint}{vision}"
    if run.stage != "stage2":  # SEED-1's language models are not served here
        return [f"{export} --out tokenizer"]
    words = language_tokenizer(Path(stage1))
    if words is not None:
        return [f"{export} --text-tokenizer {short_path(words)} --out tokenizer"]
    return [f"{export} --out tokenizer",
            f"  with --text-tokenizer FOLDER ({PARTS['tokenizer'].folder}, or another that holds a {MODEL}) the result "
            "also serves a language model and `seed eval tokenizer`'s captions."]


def language_tokenizer(stage1: Path) -> Path | None:
    """The folder of the language tokenizer for an export: the one whose word pieces stage 1 read (by the config.yaml
    beside its checkpoint), else the released one; None: neither is here."""
    config = stage1.with_name("config.yaml")
    read = OmegaConf.select(OmegaConf.load(config), "model.text_tokenizer") if config.is_file() else None
    places = (Path(locate(str(name))) for name in (read, PARTS["tokenizer"].folder) if name)
    return next((place for place in places if (place / MODEL).is_file()), None)
