"""What it costs to know whether an image is known: descriptions of new images with and without the
measure, in pairs, one thread.

    python benchmarks/familiarity.py --models pretrained/nano pretrained/nano-x
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from seed_multimodal import MultimodalSystem
from seed_multimodal.pipelines.world import Familiarity
from seed_nano.world.scene import scene_image
from seed_nano.world.splits import scene_at


def main() -> None:
    """Print a line for each system."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["pretrained/nano"])
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        system = MultimodalSystem.from_pretrained(model, device="cpu", log=None)
        measure = system.images.familiarity
        system.describe(scene_image(scene_at(5, 0)))  # the first description prepares the model
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for index in range(1, 2 * args.pairs + 1):
            is_measured = index % 2 == 0
            system.images.familiarity = measure if is_measured else Familiarity()
            image = scene_image(scene_at(5, index))
            start = time.process_time()
            system.describe(image)
            seconds[is_measured].append(time.process_time() - start)
        with_it, without = np.median(seconds[True]), np.median(seconds[False])
        print(
            f"{model}: {1000 * without:.1f} ms without, {1000 * with_it:.1f} with: "
            f"{with_it / without:.2f} x"
        )


if __name__ == "__main__":
    main()
