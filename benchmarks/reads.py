"""What training reads of its data: bytes per sample of parquet tables by the size of their row
groups, and bytes that all processes fetch of remote shards by range requests. The orders are
training's, the files are only computed; one JSON line for each measurement.

    python benchmarks/reads.py
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np

from seed_multimodal.data.formats.layout import GROUP_CACHE_BYTES, StorageLayout
from seed_multimodal.data.formats.storage import BLOCK_BYTES, CACHED_BLOCKS
from seed_multimodal.data.stream.llm_batches import CHUNKS_PER_JOB, ChunkOrder
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.sampler import EpochOrder, even_block


class Cache:
    """Parts of files, the last used ones up to a number of bytes; `read`: bytes of parts that were
    not there."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_bytes = 0
        self.n_bytes_read = 0
        self.parts: OrderedDict[Any, int] = OrderedDict()

    def use(self, part: Any, size: int) -> None:
        """Read a part of `size` bytes."""
        if part in self.parts:
            self.parts.move_to_end(part)
            return
        self.n_bytes_read += size
        self.n_bytes += size
        while self.parts and self.n_bytes > self.limit:
            self.n_bytes -= self.parts.popitem(last=False)[1]
        self.parts[part] = size


def read_table(rows: int, total: int = 20_000, row_bytes: int = 100_000) -> float:
    """Megabytes that one data worker reads per sample of a table with groups of `rows` rows."""
    sizes = np.full(total // rows, rows)
    order = EpochOrder(total, 0, layout=StorageLayout(sizes, sizes * row_bytes))
    cache = Cache(GROUP_CACHE_BYTES)
    ((_, indices),) = order.parts(0, total)
    for group in (indices // rows).tolist():
        cache.use(group, rows * row_bytes)
    return cache.n_bytes_read / total / 1e6


def read_shards(
    shards: int, world: int, workers: int, records: int = 10_000, record_bytes: int = 1024
) -> float:
    """How often the bytes of a set of shards are fetched in one epoch of all ranks' data
    workers."""
    total = shards * records
    layout = StorageLayout.of_shards(np.full(shards, records))
    order = EpochOrder(total, 0, layout=layout, block=even_block(total))
    source: Any = SimpleNamespace(
        sizes=[total],
        limits=[total],
        orders=[order],
        settings=SimpleNamespace(chunk_shape=lambda source: (1, 2048)),
    )
    source.choose_source = lambda counts, available, index: 0 if available[0] else None
    source.run_length = lambda position, world: Mixture.run_length(source, position, world)
    fetched = 0
    for rank in range(world):
        caches = [
            OrderedDict[int, Cache]() for _ in range(workers)
        ]  # of each data worker: file -> blocks
        for position, chunk in enumerate(ChunkOrder(source, rank, world).following()):
            files = caches[position // CHUNKS_PER_JOB[True] % workers]
            ((_, indices),) = order.parts(chunk.start, 1)
            file, record = divmod(int(indices[0]), records)
            cache = files.setdefault(file, Cache(BLOCK_BYTES * CACHED_BLOCKS))
            first = record * record_bytes
            for block in range(first // BLOCK_BYTES, (first + record_bytes - 1) // BLOCK_BYTES + 1):
                cache.use(block, BLOCK_BYTES)
        fetched += sum(cache.n_bytes_read for files in caches for cache in files.values())
    return fetched / (total * record_bytes)


def run(options: argparse.Namespace) -> None:
    for rows in (100, 500, 1000, 5000):
        read = round(read_table(rows), 2)
        print(json.dumps({"rows_of_a_group": rows, "megabytes_read_per_sample": read}), flush=True)
    for shards in options.shards:
        for world in (1, 8, 64):
            fetched = round(read_shards(shards, world, 2), 2)
            print(
                json.dumps(
                    {"shards": shards, "ranks": world, "workers": 2, "times_the_set": fetched}
                ),
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[20, 260], help="sets of so many shards"
    )
    run(parser.parse_args())
