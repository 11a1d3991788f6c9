"""Time the training views of the tokenizer, the old way against the new, by turns in one run. One JSON line per size.

    python benchmarks/views.py                                      # generated photographs of 640 x 480 and 1024 x 683
    python benchmarks/views.py --data 'unsplash/{00000..00009}.tar'      # own shards of jpg and json members

A view: a sample's bytes out of a shard, decoded, cropped at random, resized, stacked into a batch of 64; what one data
worker does, on one core, by its processor time. `old` decodes in full and normalises each view (fp32); `bytes` decodes
in full and hands over uint8; `new`, the default, also decodes at a fraction of the size where the crop allows it.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared import positive, print_line, rounded
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.images.train_transforms import TrainTransform

SIZES = ((640, 480), (1024, 683))
BATCH = 64


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with the spectrum of photographs (amplitude falls with the frequency)."""
    draw = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    fall = np.maximum(1, np.hypot(down, across)) ** -1.35
    grey, *colours = (np.fft.irfft2(fall * np.exp(2j * np.pi * draw.random(fall.shape)), s=(height, width))
                      for _ in range(4))
    channels = [grey + 0.3 * colour for colour in colours]
    pixels = np.stack([50 * (one - one.mean()) / one.std() + 120 for one in channels], -1).clip(0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_photographs(file: Path, size: tuple[int, int], count: int) -> float:
    """A shard of `count` pairs, made of a few photographs; returns KB a picture."""
    photographs = [photograph(*size, seed) for seed in range(8)]
    write_shard(file, ((f"{number:05d}", {"jpg": photographs[number % 8], "json": b'{"caption": "a picture"}'})
                       for number in range(count)))
    return sum(map(len, photographs)) / len(photographs) / 1024


def released(size: int) -> Any:
    """The view as it was made before: of the whole picture, normalised by the worker."""
    transform = TrainTransform(size, scaled_decoding=False)

    def view(picture: Image.Image, generator: torch.Generator) -> Tensor:
        return transform(picture, generator)

    return view


def timed(pattern: str, size: int, batches: int, repeats: int) -> dict[str, Any]:
    """Views per second of a core for each way, medians of alternating runs."""
    ways = {"old": released(size), "bytes": TrainTransform(size, scaled_decoding=False), "new": TrainTransform(size)}
    source, seconds = Pairs(pattern), {name: list[float]() for name in ways}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, transform in ways.items():
            loader = StepBatches(PairDataset(source, transform, log=None), BATCH, seed=0)
            started = time.process_time()
            for step in range(batches):
                loader.at(repeat * batches + step)
            if repeat:
                seconds[name].append(time.process_time() - started)
    rates = {name: batches * BATCH / statistics.median(taken) for name, taken in seconds.items()}
    return {**{f"{name}_views_per_core_second": rounded(rate) for name, rate in rates.items()},
            "ratio": rounded(rates["new"] / rates["old"])}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the tokenizer's training views, old against new.")
    parser.add_argument("--data", help="shards of pictures and captions; without it photographs are generated")
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--batches", type=positive, default=3, help=f"of {BATCH} views in each repeat")
    parser.add_argument("--repeats", type=positive, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"image_size": options.image_size, "batches": options.batches, "repeats": options.repeats}
    if options.data:
        print_line("views", torch.device("cpu"), {**settings, "data": options.data},
                   timed(options.data, options.image_size, options.batches, options.repeats))
        return
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            weight = write_photographs(Path(folder) / "0.tar", size, BATCH)
            print_line("views", torch.device("cpu"), {
                **settings, "pictures": f"{size[0]} x {size[1]}, {weight:.0f} KB"},
                timed(f"{folder}/0.tar", options.image_size, options.batches, options.repeats))


if __name__ == "__main__":
    main()
