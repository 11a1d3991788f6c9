"""Train the independent judge on scenes of all parts, held-out ones included.

    python -m seed_nano.report.train_judge --out pretrained/nano/judge

A step's scenes, and how their pictures are changed, are a function of (seed, step): a stopped run resumes from its
checkpoint and, on a CPU, ends bit-equal to an uninterrupted one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from seed_multimodal.device import choose_device
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import StageTask, train_stage
from seed_nano.report.augment import augment
from seed_nano.report.judge import Judge, JudgeConfig
from seed_nano.train.pixels import scene_pixels
from seed_nano.world.evaluation import HELD_OUT_SPLITS
from seed_nano.world.evaluation import scenes as listed
from seed_nano.world.scene import Scene
from seed_nano.world.splits import SPLITS, draw_scene, scene_at
from seed_nano.world.targets import JUDGED, label_tensor
from seed_nano.world.things import HELD_OUT, NAMES

STEPS, BATCH, SEED, LR, WARMUP = 1500, 96, 77, 3e-3, 200


def judge_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the judge's endless stream: any composition of any things."""
    return draw_scene(random.Random(f"judge {seed} {index}"), NAMES + HELD_OUT)


class JudgeTask(StageTask):
    """The judge's training; the record holds its accuracy on real pictures of every split.

    Args:
        out: folder that the judge is written into.
        scenes: (seed, index) -> a training scene.
        probes: scenes of each split that the accuracy is measured on.
    """

    def __init__(self, settings: StageSettings, out: Path, device: torch.device, config: JudgeConfig | None = None,
                 scenes: Callable[[int, int], Scene] = judge_scene, probes: int = 1000) -> None:
        torch.manual_seed(settings.seed)
        self.judge = Judge(config or JudgeConfig()).to(device, memory_format=torch.channels_last)
        self.out, self.scenes, self.probes = out, scenes, probes
        super().__init__("judge", self.judge, settings, parallel=False)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        judge, batch, seed = self.judge, self.settings.batch_size, self.settings.seed
        scenes = [self.scenes(seed, micro_step * batch + i) for i in range(batch)]
        size, device = judge.config.image_size, judge.where.device
        pixels = augment(scene_pixels(scenes, size), size, Generator().manual_seed(seed * 7_919 + micro_step))
        labels = label_tensor(scenes, JUDGED).to(device)
        order = list(judge.config.labels)
        found = judge(pixels.to(device, memory_format=torch.channels_last), labels[:, order.index("layout")]).logits
        losses = {name: F.cross_entropy(logits, labels[:, column])
                  for column, (name, logits) in enumerate(found.items())}
        right = found["first"].argmax(1) == labels[:, order.index("first")]
        return torch.stack(list(losses.values())).sum(), {"first_right": right.float().mean()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        judge = self.judge.eval()
        measured = real_picture_scores(judge, self.probes)
        judge.config.training = {
            "steps": self.settings.steps, "batch": self.settings.batch_size, "seed": self.settings.seed,
            "device": str(judge.where.device), "threads": torch.get_num_threads(), "real_pictures": measured}
        judge.save_pretrained(self.out)
        return {**super().finish(group), "parameters": sum(p.numel() for p in judge.parameters()),
                **{f"{split}_all": row["all"] for split, row in measured.items()}}


def real_picture_scores(judge: Judge, number: int = 1000) -> dict[str, dict[str, float]]:
    """The judge's accuracy on real pictures, its ceiling: split -> share right of each label, and of all at once."""
    found = {}
    for split in SPLITS:
        scenes = (listed(split) if split in HELD_OUT_SPLITS else [scene_at(0, i) for i in range(number)])[:number]
        pixels = scene_pixels(scenes, judge.config.image_size).permute(0, 2, 3, 1).numpy()
        right = judge.labels(pixels) == label_tensor(scenes, JUDGED)
        found[split] = {name: round(right[:, column].float().mean().item(), 4)
                        for column, name in enumerate(judge.config.labels)}
        found[split]["all"] = round(right.all(1).float().mean().item(), 4)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m seed_nano.report.train_judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pretrained/nano/judge"), help="folder to write it into")
    parser.add_argument("--work", type=Path, default=Path("runs/judge"), help="folder of checkpoint, log and record")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="auto")
    return run_program(parser, _train, arguments, "train judge")


def _train(options: argparse.Namespace) -> int:
    settings = StageSettings(steps=options.steps, batch_size=options.batch, lr=LR, warmup=WARMUP, weight_decay=0.05,
                             seed=options.seed)
    device = choose_device(options.device, "float32").device
    record = train_stage(JudgeTask(settings, options.out, device), options.work)
    shown = ("seconds", "parameters", *(f"{split}_all" for split in SPLITS))
    print(f"Saved {options.out}: " + ", ".join(f"{key} {record[key]}" for key in shown if key in record))
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
