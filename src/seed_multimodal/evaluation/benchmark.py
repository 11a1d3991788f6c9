"""Evaluation of a system on a benchmark's files.

    run = Run("vqa", "vizwiz", Path("val.json"), Path("outputs/vizwiz"), images=Path("vizwiz"))
    summary = evaluate(system, run)

Samples go through the systems' batch methods (`ask_all`, `describe_all`, `draw_all`). SEED-LLaMA answers with the
settings of the original scripts, LaVIT with those of its published evaluation, other systems with their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.benchmarks import Sample, read_captions, read_questions
from seed_multimodal.disk import sampled_hash, sha256_of
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.answers import Line, answer_samples, finish
from seed_multimodal.evaluation.captions import Captions
from seed_multimodal.evaluation.drawing import Drawings
from seed_multimodal.evaluation.task_table import LAVIT_DRAWING, SEED_LLAMA, Run
from seed_multimodal.evaluation.vqa import Questions
from seed_multimodal.language.prompts import get_template
from seed_multimodal.systems.lavit import Lavit
from seed_multimodal.systems.seed_llama import SeedLlama


def evaluate(system: Any, run: Run, samples: Sequence[Sample] | None = None) -> Line | None:
    """Evaluate a system, alone or under torchrun; the same call resumes.

    Args:
        samples: in place of those of `run.annotations`.

    Returns:
        The summary, to the process that finishes last; else None.

    Raises:
        DataError, CheckpointError, ConfigError: files, weights or settings that are missing or wrong.
    """
    samples = list(read_samples(run) if samples is None else samples)[:run.limit]
    set_prompts(system, run.prompts, run.caption_prompt)
    usual = SEED_LLAMA[run.task] if isinstance(system, SeedLlama) else {}
    options = {**(LAVIT_DRAWING if isinstance(system, Lavit) and run.task == "text2image" else usual), **run.options}
    work: Any = (Questions(system, run, options) if run.task == "vqa" else
                 Captions(system, run, options) if run.task == "caption" else
                 Drawings(system, run, options, {one.key: number for number, one in enumerate(samples)}))
    facts = {"task": run.task, "dataset": run.dataset, "annotations": _identity(run.annotations), "options": options,
             "prompts": run.prompts, "caption_prompt": run.caption_prompt, "seed": run.seed, "best_of": run.best_of,
             "clip": str(run.clip), "transform": repr(getattr(system.pictures, "transform", None)), **_model(system)}
    lines = answer_samples(samples, work.answer, run.out, facts, images=run.images, source=run.annotations,
                           batch=run.batch, max_bad=run.max_bad)
    if lines is None:
        return None
    return finish(run.out, run.results, lines, *work.score([one for one in samples if not one.problem],
                                                          {line["id"]: line for line in lines}))


def read_samples(run: Run) -> list[Sample]:
    """The samples of a run. Raises DataError: see the readers."""
    if run.task == "vqa":
        return read_questions(run.annotations, run.truth)
    return read_captions(run.annotations, run.split, run.truth, each_text=run.task == "text2image")


def set_prompts(system: Any, prompts: str, caption_prompt: str = "") -> None:
    """Make a SEED-LLaMA read the tuned models' requests ("chat"), or the pretrained model's bare ones ("plain").

    Raises:
        ConfigError: another system that is asked in bare prompts.
    """
    if not isinstance(system, SeedLlama):
        if prompts == "plain":
            raise ConfigError(f"{system.spec.name}: is no SEED-LLaMA, which alone has plain prompts.")
        return
    if prompts == "plain":
        system.template, system.speaker.marker = get_template("plain"), ""
        system.tasks = replace(system.tasks, describe=caption_prompt, qa_suffix="", draw_response="", draw_words=0)
    elif caption_prompt:
        system.tasks = replace(system.tasks, describe=caption_prompt)


def _identity(file: Path) -> dict[str, str]:
    return {"file": str(file), "sha256": sha256_of(file) if file.is_file() else ""}


def _model(system: Any) -> dict[str, Any]:
    """Which weights a system has (hashed at a few places of each file), and in what precision."""
    bits = next((bits for bits in ("8bit", "4bit") if getattr(system.llm, f"is_loaded_in_{bits}", False)), None)
    places = {value for value in vars(system.spec).values() if isinstance(value, Path)}
    files = {file.resolve() for place in places for file in ([place] if place.is_file() else place.rglob("*"))
             if file.suffix in (".safetensors", ".bin", ".pt", ".pth") and file.is_file()}
    return {"model": system.spec.name, "dtype": str(system.llm.dtype).removeprefix("torch."), "quantization": bits,
            "weights": hashlib.sha256("".join(sorted(map(sampled_hash, files))).encode()).hexdigest()[:16]}
