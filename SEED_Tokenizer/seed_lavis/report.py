"""The summary at the end of a run: steps, speed, files, and the command that comes next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from seed_lavis.context import RunContext
from seed_lavis.options import APPLICATION, RunOptions, locate
from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.hub import PARTS
from seed_multimodal.language.tokenizer import ADDED, MODEL, read_files
from seed_multimodal.lavit.training import REFERENCE
from seed_multimodal.progress import duration
from seed_multimodal.seed.configuration import QFormerConfig

NAMES = {"stage1": "Stage 1 (causal Q-Former)", "stage2": "Stage 2 (codebook)", "seed1-stage2": "SEED-1's stage 2",
         "lavit-stage1": "LaVIT's stage 1 (tokenizer)"}
# What stage 2 takes over of a run of stage 1: of the model as it is, of the run what differs from the published file.
OF_MODEL = ("vit", "qformer", "image_size", "num_query_token", "cross_attention_freq", "vit_weights", "vit_precision",
            "compile")
OF_RUN = ("batch_size_train", "batch_size_eval", "num_workers", "seed", "amp", "precision", "train_splits",
          "valid_splits", "valid_batches", "train_dataset_ratios", "max_bad_in_a_row", "timeout_minutes")


def short_path(path: str | Path) -> str:
    """A path as it is shortest from here."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near


def summary(run: RunContext, record: dict[str, Any]) -> list[str]:
    """Lines for the end of a run."""
    earlier = record.get("begun", 0)  # steps that another run made, before its checkpoint
    own = (record["steps"] - earlier) * record["batch_size"] * record.get("accumulate", 1)
    samples, spent = own * record.get("processes", 1), float(record["seconds"])
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items()
                        if name.startswith("loss") and isinstance(value, float))
    folder = short_path(run.folder)
    lines = [
        f"{NAMES.get(run.stage, run.stage)}: {record['steps']:,} steps"
        + (f" ({earlier:,} of them before run.resume_ckpt_path)" if earlier else "")
        + f", {samples:,} pictures in {duration(spent)}" + (f"; at the end {numbers}." if numbers else "."),
        f"  checkpoint  {short_path(record['checkpoint'])}",
        f"  log         {folder}/{run.stage}.log.jsonl, {folder}/config.yaml",
    ]
    if record.get("bad_samples"):
        lines.append(f"  {record['bad_samples']} samples that cannot be used were replaced; the log names them.")
    return [*lines, *_next(run, record)]


def _next(run: RunContext, record: dict[str, Any]) -> list[str]:
    checkpoint, options = short_path(record["checkpoint"]), run.model.options
    if run.stage == "stage1":
        file, script = write_stage2(run, record), APPLICATION / "train_scripts" / "codebook.sh"
        place = file.relative_to(APPLICATION) if file.is_relative_to(APPLICATION) else file  # where the script goes
        return [f"Next: CONFIG={place} sh {short_path(script)}"]
    if run.stage == "lavit-stage1":
        vision = short_path(run.model.vision_file) if run.model.vision_file else "TOWER"
        return [f"Next: seed export-tokenizer --lavit {checkpoint} --vision {vision} --out tokenizer",
                f"  the released tokenizer is said to have ended at loss_cosine {REFERENCE}."]
    stage1 = locate(str(options.pretrained)) if options.load_pretrained else "STAGE1.pth"
    vision = f" --vision {short_path(run.model.vision_file)}" if run.model.vision_file else ""
    export = f"Next: seed export-tokenizer --stage1 {short_path(stage1)} --stage2 {checkpoint}{vision}"
    if run.stage != "stage2":  # SEED-1's language models are not served here
        return [f"{export} --out tokenizer"]
    words = language_tokenizer(Path(stage1), options.n_embed)
    if words is not None:
        return [f"{export} --text-tokenizer {short_path(words)} --out tokenizer"]
    return [f"{export} --out tokenizer",
            f"  with --text-tokenizer FOLDER (with {MODEL} and words for {options.n_embed} codes) the result also "
            "serves a language model and `seed eval tokenizer`'s captions."]


def write_stage2(run: RunContext, record: dict[str, Any]) -> Path:
    """`stage2.yaml` in the run's folder: the published settings of stage 2 (where the Q-Former is smaller, nano's) on
    this run's data, with its sizes and vision encoder; a CLIP that it used gives the target."""
    config = run.config.config
    project = "blip2/train" if run.model.config.qformer.width >= QFormerConfig.width else "nano"
    published, made = (OmegaConf.load(APPLICATION / "lavis" / "projects" / project / f"pretrain_{stage}.yaml")
                       for stage in ("qformer", "codebook"))
    for key in OF_MODEL:
        made.model.pop(key, None)
        if config.model.get(key) is not None:
            made.model[key] = config.model[key]
    for key in OF_RUN:
        if (own := getattr(run.options, key)) != published.run.get(key, getattr(RunOptions(), key)):
            made.run[key] = own
    made.datasets, made.run.output_dir = config.datasets, f"{run.folder}_codebook"
    made.model.update(pretrained=record["checkpoint"], decode_heads=run.model.config.qformer.heads)
    for clip in (config.model.get("clip_model"), config.model.get("vit_weights")):
        file = Path(locate(str(clip)), "config.json")
        if clip and file.is_file() and "projection_dim" in (sizes := read_json_object(file)):
            made.model.update(clip_model=clip, image_features_dim=sizes["projection_dim"])
            break
    words = Path(locate(str(run.model.options.text_tokenizer)))
    if (words / ADDED).is_file():
        made.model.n_embed = read_files(words).vocabulary.n_codes
    with writing(run.folder):
        replace_text(run.folder / "stage2.yaml", OmegaConf.to_yaml(made))
    return run.folder / "stage2.yaml"


def language_tokenizer(stage1: Path, codes: int) -> Path | None:
    """The folder of a language tokenizer with words for so many codes, for an export: the one whose word pieces stage 1
    read (by the config.yaml beside its checkpoint), else the released one; None: neither is here."""
    config = stage1.with_name("config.yaml")
    read = OmegaConf.select(OmegaConf.load(config), "model.text_tokenizer") if config.is_file() else None
    places = (Path(locate(str(name))) for name in (read, PARTS["tokenizer"].folder) if name)
    return next((place for place in places
                 if (place / ADDED).is_file() and read_files(place).vocabulary.n_codes == codes), None)
