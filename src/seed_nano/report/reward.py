"""The judge as a reward of `train_rl.py`, its prompts, and what a training by it has changed.

    python -m seed_nano.report.reward --write log/rl_prompts
    python -m seed_nano.report.reward --prompts FILE --judge FOLDER --model nano CHECKPOINT

The prompts are scenes of the split `styles`: a thing in a style in which no training showed it. The
things of `train.jsonl` and `same_things.jsonl`, other scenes of them, are not those of
`held_out.jsonl`. A second judge (`python -m
seed_nano.report.judge --seed 1 --widths ...`) that gave no reward measures the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seed_multimodal.cli.common import add_flags, load_system, program_parser
from seed_multimodal.disk import JsonObject, replace_json, replace_text
from seed_multimodal.entry import DONE, add_device, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.metrics import bootstrap
from seed_multimodal.rl.rewards import Records, Reward
from seed_multimodal.rl.task import read_prompts
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.scoring import BoolArray, LabelNames, image_labels, label_matches, true_labels
from seed_nano.report.write import table
from seed_nano.world.splits import hash_share, scene_at
from seed_nano.world.words import describe

SPLIT = "styles"
SEED = 64  # of the prompts' scenes


def open_reward(model: str, records: Records, device: torch.device) -> Reward:
    """The share of a prompt's labels that the judge (a folder, or that of a system) sees."""
    folder = Path(model)
    if not (folder / "config.json").is_file():
        folder = find_judge(model)
    judge = Judge.from_pretrained(folder).to(device)
    for record in records:
        labels = record.get("labels")
        is_named = isinstance(labels, dict) and labels.keys() >= judge.config.labels.keys()
        if not isinstance(labels, list) and not is_named:
            raise DataError(f"data: prompt {record.get('prompt')!r}: has no labels for the judge.")

    def reward(images: Sequence[Image.Image], records: Records) -> list[float]:
        shares: list[float] = matches(judge, images, records).mean(1).tolist()
        return shares

    return reward


def matches(judge: Judge, images: Sequence[Image.Image], records: Records) -> BoolArray:
    """Which labels `[N, 5]` of the records the judge sees."""
    wanted: list[LabelNames] = []
    for record in records:
        labels = record["labels"]
        is_named = isinstance(labels, dict)
        wanted.append(
            tuple(labels[name] for name in judge.config.labels) if is_named else tuple(labels)
        )
    return label_matches(image_labels(judge, list(images)), wanted)


def prompt_records(n_train: int, n_held_out: int) -> tuple[list[JsonObject], list[JsonObject]]:
    """Records for training, and of other things for the evaluation."""
    parts: tuple[list[JsonObject], list[JsonObject]] = ([], [])
    limits = (n_train, n_held_out)
    index = 0
    while any(len(part) < limit for part, limit in zip(parts, limits, strict=True)):
        scene = scene_at(SEED, index, SPLIT)
        index += 1
        sides = {hash_share("reward", name) < 0.5 for name in scene.things}
        side = int(sides.pop())
        if sides or len(parts[side]) == limits[side]:  # a thing of each part, or a full part
            continue
        labels = list(true_labels([scene])[0])
        parts[side].append({"prompt": describe(scene), "labels": labels})
    return parts


def run(args: argparse.Namespace) -> int:
    # 1. The prompts.
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
        trained_things, other_things = prompt_records(2 * args.number, args.number)
        for name, part in (
            ("train", trained_things[: args.number]),
            ("same_things", trained_things[args.number :]),
            ("held_out", other_things),
        ):
            lines = [json.dumps(record) + "\n" for record in part]
            replace_text(args.write / f"{name}.jsonl", "".join(lines))
            print(f"{args.write / name}.jsonl: {len(part)} prompts")
        return DONE

    # 2. The drawings of each system, the same prompts and seeds.
    records = read_prompts(str(args.prompts))[: args.number]
    judge = Judge.from_pretrained(find_judge("nano", args.judge))
    hits: dict[str, np.ndarray] = {}
    for model in args.model:
        system = load_system(args, model)
        texts = [record["prompt"] for record in records]
        images = system.draw(texts, seed=range(len(texts)), read_back=False)
        hits[model] = matches(judge, images, records).all(1).astype(float)

    # 3. Every label right; the difference from the first system, prompt by prompt.
    first = hits[next(iter(hits))]
    rows: list[list[str]] = []
    for model, right in hits.items():
        rows.append([model, interval(right), interval(right - first), str(len(right))])
    print(table(["system", "every label", "difference from the first", "n"], rows))
    if args.out is not None:
        estimates = [bootstrap(right).to_json() for right in hits.values()]
        replace_json(args.out, {"models": list(hits), "right": estimates})
    return DONE


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval."""
    mean = bootstrap(values)
    return f"{mean.value:.3f} ({mean.low:.3f} … {mean.high:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = program_parser("python -m seed_nano.report.reward", __doc__ or "")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write prompts there")
    parser.add_argument("--number", type=int, default=500, help="prompts of a file (500)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts that are drawn")
    parser.add_argument("--judge", type=Path, help="folder of the judge (default: the shipped one)")
    parser.add_argument(
        "--model", nargs="+", default=["nano"], help="systems; the first: the start"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    add_device(parser)
    add_flags(parser, "language model")
    return run_program(parser, run, argv, "reward report")


if __name__ == "__main__":
    raise SystemExit(main())
