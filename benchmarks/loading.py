"""Time reading data: JPEGs to pixels and codes; indexing shards, records in shuffled order.

python benchmarks/loading.py --records 50000 --images 64

Images: CPU-milliseconds to RGB and to the encoder's size, and images/s of tokenising, each beside
plain Pillow (`Image.open(file).convert("RGB")`, batch after batch) in alternating runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from seed_multimodal.cli.common import read_ahead
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.io import open_image
from seed_multimodal.pipelines.images import open_images

SIZES = ((256, 256), (640, 480), (2048, 1536))
BATCH = 32


def run_records(count: int, folder: Path) -> None:
    """Write shards and lines of captions with 32 codes, index and read them."""
    rng = np.random.default_rng(0)
    records = [
        json.dumps(
            {"image_ids": rng.integers(8192, size=32).tolist(), "text": f"caption number {n}"}
        ).encode()
        for n in range(count)
    ]
    for kind in ("tar", "jsonl"):
        path = folder / f"codes.{kind}"
        if kind == "tar":
            write_shard(path, ((f"{n:09d}", {"json": data}) for n, data in enumerate(records)))
        else:
            path.write_bytes(b"\n".join(records))
        source = open_records(path)
        started = time.perf_counter()
        # The first `len` indexes the file.
        len(source)
        indexed = time.perf_counter()
        # Every record once, in shuffled order.
        for n in rng.permutation(count).tolist():
            source.read(n)
        read = time.perf_counter()
        print(
            f"{kind}: {count / (read - indexed):,.0f} records/s; indexing "
            f"{(indexed - started) / count * 1e6:.2f} µs a record"
        )


def run_images(options: argparse.Namespace, folder: Path) -> None:
    """Write JPEGs of each size; decode, resize and tokenize them."""
    codec: Any = open_images(options.model, device=options.device)
    resize = codec.transform.resize

    def ahead(files: list[str]) -> None:
        for batch in read_ahead(files, codec.preprocess, BATCH):
            codec.forget()  # what an earlier run has encoded
            codec.encode([image.result() for image in batch])

    def one_by_one(files: list[str]) -> None:
        for start in range(0, len(files), BATCH):
            codec.forget()
            codec.encode([plain(file) for file in files[start : start + BATCH]])

    for width, height in SIZES:
        # 1. The files.
        files = [str(folder / f"{width}-{index}.jpg") for index in range(options.images)]
        for index, file in enumerate(files):
            coarse = (height // 16, width // 16, 3)
            levels = np.random.default_rng(index).integers(0, 255, coarse, dtype=np.uint8)
            photo = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
            photo.save(file, quality=90)

        # 2. One after the other, on one core; then to codes.
        ways: dict[str, Callable[[str], Any]] = {
            "RGB": lambda file: open_image(file).image,
            "plain RGB": plain,
            "torchvision": lambda file: decode_image(file, ImageReadMode.RGB),
            "resized": lambda file: resize(open_image(file).image),
            "plain resized": lambda file: resize(plain(file)),
        }
        runs = {name: partial(each, way, files) for name, way in ways.items()}
        cpu = timed(runs, time.process_time, options.repeats)
        runs = {"codes": partial(ahead, files), "plain codes": partial(one_by_one, files)}
        wall = timed(runs, time.perf_counter, options.repeats)
        columns = [f"{name} {seconds / len(files) * 1e3:.2f}" for name, seconds in cpu.items()]
        rates = [f"{name} {len(files) / seconds:.0f}" for name, seconds in wall.items()]
        print(f"{width}x{height}: {', '.join(columns)} CPU-ms; {', '.join(rates)} images/s")


def plain(file: str) -> Image.Image:
    return Image.open(file).convert("RGB")


def each(way: Callable[[str], Any], files: list[str]) -> None:
    for file in files:
        way(file)


def timed(
    runs: dict[str, Callable[[], Any]], clock: Callable[[], float], repeats: int
) -> dict[str, float]:
    """Median seconds of each, in alternating order after an unmeasured one."""
    seconds = defaultdict[str, list[float]](list)
    for repeat in range(repeats + 1):
        for name, run in list(runs.items())[:: -1 if repeat % 2 else 1]:
            started = clock()
            run()
            if repeat:
                seconds[name].append(clock() - started)
    return {name: statistics.median(seconds[name]) for name in runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=64, help="of each size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="pretrained/nano")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        run_images(options, Path(name))  # first, as in a command: later memory is there already
        run_records(options.records, Path(name))
