"""Time reading training data: indexing shards, and records in shuffled order.

python benchmarks/loading.py --records 50000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.shards import write_shard


def run(options: argparse.Namespace) -> None:
    """Write shards and lines of captions with 32 codes, index and read them."""
    rng = np.random.default_rng(0)
    records = [
        json.dumps(
            {"image_ids": rng.integers(8192, size=32).tolist(), "text": f"caption number {n}"}
        ).encode()
        for n in range(options.records)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("tar", "jsonl"):
            path = Path(folder) / f"codes.{kind}"
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
            for n in rng.permutation(options.records).tolist():
                source.read(n)
            read = time.perf_counter()
            print(
                f"{kind}: {options.records / (read - indexed):,.0f} records/s; indexing "
                f"{(indexed - started) / options.records * 1e6:.2f} µs a record"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=50_000)
    run(parser.parse_args())
