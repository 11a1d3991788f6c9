"""LaVIT's `evaluate.py`: the published evaluations, alone or under torchrun."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.cli import common
from seed_multimodal.config import read_table
from seed_multimodal.entry import run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_value

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

# Task → data set → annotations, images and ground truth (see the file).
DATA: dict[str, dict[str, tuple[str, str, str | None]]] = read_table(__file__)


def evaluate_script(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = common.program_parser("evaluate.py", str(description))
    common.add_flags(parser, "evaluate.py")
    common.add_flags(parser, "language model")
    parser.set_defaults(max_bad=20, prompts="chat")
    return run_program(parser, _evaluate, argv)


def _evaluate(args: Namespace) -> int:
    """One of the published evaluations; the summary goes to stdout."""
    from seed_multimodal.cli.evaluate import run_benchmark
    from seed_multimodal.compat.lavit import original_config, original_device
    from seed_multimodal.evaluation.benchmark import benchmark_class, open_benchmark
    from seed_multimodal.evaluation.clip import NAME
    from seed_multimodal.evaluation.text2image import find_clip

    # 1. The data: by the flags, else at the original's paths.
    task = args.task_name
    draws = task == "text2image"
    datasets = [*DATA[task]]
    dataset = args.dataset or datasets[0]
    check_value(str, dataset, f"--dataset of {task}", choices=datasets)
    annotations, images, truth = DATA[task][dataset]
    annotations = args.annopath or annotations
    args.images = args.images or Path(images)
    args.out = args.out or f"tmp/{task}/{dataset}"

    # 2. The original's settings of the task.
    args.device = args.device or original_device(None)
    config = original_config(args.model_path, head="lowres" if draws else None, check_safety=False)
    values = {
        **common.set_flags(args, benchmark_class(task)),
        "file": annotations,
        "truth": args.truth or _find_truth(truth, Path(annotations).parent),
    }
    if draws:
        # The original keeps CLIP's weights in the model's folder.
        clip = args.clip
        for folder in (Path(args.model_path), config.tokenizer):
            if not clip and folder is not None and (folder / NAME).is_file():
                clip = folder / NAME
        clip = find_clip(clip, alternative=f"put the original's {NAME} into --model_path")
        values |= {"best_of": 4, "clip": clip, "seed": 0}
    elif task == "vqa":
        values["dataset"] = dataset

    # 3. The evaluation, which loads the system after the samples.
    def load() -> MultimodalSystem:
        if not args.images.is_dir():
            raise ConfigError(
                f"--imagepath {args.images}: no such folder; it holds {dataset}'s images."
            )
        return common.load_system(args, config, load_decoder=draws)

    return run_benchmark(open_benchmark(task, **values), load)


def _find_truth(truth: str | None, folder: Path) -> Path | None:
    """The ground-truth file of a data set: at its path, else in the folder of the annotations.

    The official file if the lemmatized one is missing. None: the annotations contain it.
    """
    if truth is None:
        return None
    for name in (truth, truth.replace("_lemm", "")):
        for file in (Path(name), folder / Path(name).name):
            if file.is_file():
                return file
    return None
