"""Compare numbers of drawing steps of a system on the same scenes, from codes and descriptions.

One JSON line for each section, split and number of steps: the judge's accuracy over all labels, and
its paired difference to the first number of steps; images a CPU-second.

    python -m seed_nano.report.steps --model pretrained/nano --steps 4 3 2 --splits val --limit 250
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.evaluation.metrics import bootstrap
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.samples import Sizes
from seed_nano.report.scoring import image_labels, label_matches, true_labels
from seed_nano.report.systems import System, load_system
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import HELD_OUT_SPLITS, scenes
from seed_nano.world.words import describe


def main() -> None:
    """Encode and generate once, decode with each number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--splits", nargs="+", default=["val"], choices=HELD_OUT_SPLITS)
    parser.add_argument("--limit", type=int, default=250, help="drawings; twice as many images")
    args = parser.parse_args()
    system = load_system(args.model, device="cpu", dtype="float32", log=None)
    judge = Judge.from_pretrained(find_judge(args.model, None))
    sizes = Sizes.limited(args.limit)
    for split in args.splits:
        # 1. Images in the system's representation: real ones, and those of descriptions.
        targets = scenes(split)[: sizes.gallery]
        encoded = system.encode(
            [Image.fromarray(render(scene, system.image_size)) for scene in targets]
        )
        sections: dict[str, tuple[list[Scene], list[Any]]] = {"reconstruction": (targets, encoded)}
        if split != "things":  # only reconstructed
            drawn = targets[: sizes.scenes]
            sections["drawing"] = (drawn, system.draw(list(map(describe, drawn))))

        # 2. The same ones, decoded with each number of steps.
        for name, (wanted, images) in sections.items():
            compare(system, judge, args.steps, wanted, images, {"split": split, "section": name})


def compare(
    system: System,
    judge: Judge,
    steps: list[int],
    targets: list[Scene],
    images: list[Any],
    labels: dict[str, str],
) -> None:
    """Print a line for each number of steps."""
    decoder = system.inner.images.decoder
    first = None
    for n_steps in steps:
        decoder.defaults = replace(decoder.defaults, num_inference_steps=n_steps)
        started = time.process_time()
        drawings = system.decode_complete(images)
        seconds = time.process_time() - started
        matches = label_matches(image_labels(judge, drawings), true_labels(targets))
        right = np.all(matches, axis=1).astype(float)
        if first is None:
            first = right
        line = {
            **labels,
            "steps": n_steps,
            "all": bootstrap(right).to_json(),
            "difference": bootstrap(right - first).to_json(),
            "images_per_cpu_second": round(len(images) / seconds, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
