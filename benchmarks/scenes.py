"""Scenes of nano's world a second: drawn, and as training pairs through the ordinary loader.

    python benchmarks/scenes.py                      one JSON line; 2 workers
    python benchmarks/scenes.py --workers 8 --transform train
"""

from __future__ import annotations

import argparse

import torch
from shared import measure, positive, print_line, rounded

from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.entry import whole_number
from seed_multimodal.images.train_transforms import TrainTransform
from seed_multimodal.images.transforms import seed_image_processor
from seed_nano.world.scene import SIZE, render
from seed_nano.world.splits import scene_at

TRANSFORMS = {"plain": seed_image_processor, "train": TrainTransform}


def main() -> None:
    """Time the stages apart, then the loader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive, default=SIZE, help="side of a picture in pixels")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="data processes (0: in this one)")
    parser.add_argument("--transform", choices=tuple(TRANSFORMS), default="plain", help="train: a random crop")
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--batches", type=positive, default=20, help="timed in each repeat")
    parser.add_argument("--repeats", type=positive, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, count = torch.device("cpu"), options.batch * options.batches

    def made() -> None:
        for index in range(count):
            scene_at(0, index)

    scenes = [scene_at(0, index) for index in range(options.batch)]

    def drawn() -> None:
        for scene in scenes:
            render(scene, options.size)

    source = open_pairs({"format": "nano", "number": 100 * count, "size": options.size})
    data = PairDataset(source, TRANSFORMS[options.transform](options.size), log=None)
    with StepBatches(data, options.batch, seed=0, workers=options.workers) as batches:
        step = 0

        def loaded() -> None:
            nonlocal step
            for _ in range(options.batches):
                batches.at(step)
                step += 1

        seconds = {name: measure(work, device, options.repeats)["seconds"] / number for name, work, number in (
            ("chosen", made, count), ("drawn", drawn, options.batch), ("loaded", loaded, count))}
    print_line("scenes", device, {name: getattr(options, name) for name in
                                  ("size", "workers", "transform", "batch", "batches", "repeats")},
               {f"{name}_per_second": rounded(1 / value) for name, value in seconds.items()})


if __name__ == "__main__":
    main()
