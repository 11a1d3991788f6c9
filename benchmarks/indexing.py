"""How long the first start on a large data set takes, and every later one: indexing and opening generated records.

    python benchmarks/indexing.py              # 10 million records in tars: 10 MB of disk, and 0.24 GB of indexes
    python benchmarks/indexing.py --format jsonl --records 100000000 --folder /scratch

One JSON line: seconds of the cold start (every file is read, by as many processes as there are cores), of a warm one in
a new process, records a second, resident memory of the warm process before and after it has read 1,000 records, and how
much of that is its own (the rest is the mapped indexes, which all processes share). Tars and tables are one small file
under many names (hard links), each indexed for itself: reading comes from the page cache, so disks are not measured.
Files of lines are really written, about 90 bytes a record.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from shared import positive, print_line, rounded

from seed_multimodal.data.formats.index_store import FOLDER
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.writer import write_shard

PER_SHARD = 10_000
TEXT = "a caption of about the usual length"


def generate(folder: Path, format: str, records: int) -> None:
    """Write the records: shards of 10,000 each under many names, or lines."""
    if format in ("jsonl", "json"):
        line = '{"image_ids": [17, 42, 8191, 5], "text": "' + TEXT + ' %09d"}'
        with open(folder / f"records.{format}", "w", encoding="utf-8") as file:
            lines, end = format == "jsonl", "\n" if format == "jsonl" else ",\n"
            file.write("" if lines else "[\n")
            for start in range(0, records, PER_SHARD):
                several = end.join(line % number for number in range(start, min(start + PER_SHARD, records)))
                last = start + PER_SHARD >= records
                file.write(several + ("\n" if lines or last else end))
            file.write("" if lines else "]\n")
        return
    count = -(-records // PER_SHARD)
    first = folder / f"00000.{format}"
    if format == "tar":
        content = json.dumps({"image_ids": list(range(32)), "text": TEXT}).encode()
        write_shard(first, ((f"{number:09d}", {"json": content}) for number in range(PER_SHARD)))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{TEXT} {number}" for number in range(PER_SHARD)]}), first)
    for number in range(1, count):
        os.link(first, folder / f"{number:05d}.{format}")


def start(folder: Path, reads: int) -> dict[str, Any]:
    """Open the records as a training does, and read some; what it took."""
    begun = time.perf_counter()
    source = open_records(str(folder))
    count = len(source)
    seconds = time.perf_counter() - begun
    opened = memory()
    draw = random.Random(0)
    for _ in range(reads):
        source.read(draw.randrange(count))
    return {"records": count, "seconds": rounded(seconds), "rss_mib": opened, "rss_after_reading_mib": memory()}


def memory() -> dict[str, float]:
    """MiB of this process in memory: all, and what is its own."""
    pages = [int(text) for text in Path("/proc/self/statm").read_text().split()]
    unit = os.sysconf("SC_PAGESIZE") / 2**20
    return {"all": rounded(pages[1] * unit), "own": rounded((pages[1] - pages[2]) * unit)}


def main() -> None:
    """Generate, start cold and warm (each in a process of its own), print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=positive, default=10_000_000)
    parser.add_argument("--format", choices=("tar", "jsonl", "json", "parquet"), default="tar")
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(Path(options.start), 1000)))
        return
    with tempfile.TemporaryDirectory(prefix="indexing-", dir=options.folder) as place:
        folder = Path(place)
        begun = time.perf_counter()
        generate(folder, options.format, options.records)
        made = time.perf_counter() - begun
        cold, warm = (json.loads(subprocess.run([sys.executable, __file__, "--start", place], check=True, text=True,
                                                stdout=subprocess.PIPE).stdout) for _ in range(2))
        kept = sum(file.stat().st_size for file in (folder / FOLDER).glob("*"))
        print_line("indexing", torch.device("cpu"), {"format": options.format, "records": cold["records"],
                                                     "files": len(list(folder.glob("*.*")))}, {
            "generating_s": rounded(made), "cold_start_s": cold["seconds"],
            "records_per_s": rounded(cold["records"] / cold["seconds"]), "warm_start_s": warm["seconds"],
            "index_mib": rounded(kept / 2**20), "index_bytes_per_record": rounded(kept / cold["records"]),
            "warm_rss_mib": warm["rss_mib"], "warm_rss_after_reading_mib": warm["rss_after_reading_mib"]})


if __name__ == "__main__":
    main()
