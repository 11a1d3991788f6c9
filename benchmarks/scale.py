"""Count what grows with shards, records and processes, in a table.

python benchmarks/scale.py --shards 2000 --many 100000 --ranks 8 16 32

Calls are those that strace sees under the data folder, memory and CPU seconds are of fresh
processes, open files of real processes that meet by gloo, and nodes are simulated with the order of
the trainings (`scale_nodes.py`).
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LINKS = 30_000  # to one file; file systems allow 32,000 or more
RECORDS = {
    "codes": {"json": 300},
    "images": {"jpg": 600, "txt": 40, "json": 100},
}  # bytes of each member


def main(options: argparse.Namespace) -> None:
    """Make the folders, count in fresh processes, print the table's rows as they come."""
    print("| count | figure |\n| --- | ---: |")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        for row, figure in [
            *opening_calls(root, options.shards),
            *memory(root),
            *opening_many(root, options.many),
            *pretokenizing_calls(root, options.shards),
            *open_files(options.ranks),
        ]:
            print(f"| {row} | {figure} |", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("scale_nodes.py"))]
    subprocess.run(command, check=True)


# ---- counts, each a few rows of the table


def opening_calls(root: Path, n_shards: int) -> Iterator[tuple[str, str]]:
    """Calls of a process that opens indexed shards, by each way to name them."""
    folder = root / "opened"
    write_tar(folder / "00000.tar", 20, RECORDS["codes"])
    link_copies(folder, n_shards)
    index(folder)
    last = f"{n_shards - 1:05d}"
    for pattern in (folder, folder / "*.tar", folder / f"{{00000..{last}}}.tar"):
        calls = traced_calls(folder, ["open", str(pattern)])
        shown = str(pattern).replace(str(folder), "FOLDER")
        yield (
            f"calls a shard and process, `{shown}`, {n_shards:,} shards",
            f"{calls / n_shards:.4f}",
        )


def memory(root: Path) -> Iterator[tuple[str, str]]:
    """Resident bytes a record, and the bytes of an index, of 200 shards of 5,000 records."""
    n_shards, n_records = 200, 5000
    for kind, members in RECORDS.items():
        folder = root / kind
        write_tar(folder / "00000.tar", n_records, members)
        link_copies(folder, n_shards)
        index(folder)
        stored = sum(file.stat().st_size for file in (folder / ".seed-index").iterdir())
        bytes_a_record, _ = map(float, fresh(["resident", str(folder)]).split())
        yield f"resident bytes a record and process, {kind}", f"{bytes_a_record:.2f}"
        n_members = n_shards * n_records * len(members)
        yield f"bytes of a stored index a member, {kind}", f"{stored / n_members:.1f}"


def opening_many(root: Path, n_shards: int) -> Iterator[tuple[str, str]]:
    """CPU seconds of a process that opens many small shards, the first and the second time."""
    folder = root / "many"
    for start in range(0, n_shards, LINKS):
        write_tar(folder / f"{start:06d}.tar", 2, RECORDS["codes"])
        link_copies(folder, min(LINKS, n_shards - start), start, digits=6)
    for time_ in ("first", "second"):
        _, seconds = map(float, fresh(["resident", str(folder)]).split())
        yield f"CPU seconds of opening {n_shards:,} shards, {time_} process", f"{seconds:.2f}"


def pretokenizing_calls(root: Path, n_shards: int) -> Iterator[tuple[str, str]]:
    """Calls of a process that meets shards that are written already."""
    folder = root / "written"
    folder.mkdir()
    for number in range(n_shards):
        (folder / f"{number:06d}.tar").touch()
    calls = traced_calls(folder, ["queue", str(folder), str(n_shards)])
    yield "calls of pre-tokenising a finished shard and process", f"{calls / n_shards:.4f}"


def open_files(ranks: list[int]) -> Iterator[tuple[str, str]]:
    """Open files of a rank of the trainings' process groups."""
    for world in ranks:
        first, others = fresh(["group", str(world)]).split()
        # The first one holds the meeting point, which torchrun holds in a process of its own.
        yield f"open files of a rank, {world} ranks (of the first)", f"{others} ({first})"


# ---- fresh processes


def open_all(pattern: str) -> None:
    """Open the records of a pattern."""
    from seed_multimodal.data.formats.records import open_records

    len(open_records(pattern))


def resident(pattern: str) -> None:
    """Print the resident bytes that opening adds for a record, and its CPU seconds."""
    import psutil

    from seed_multimodal.data.formats.records import open_records

    process = psutil.Process()
    before = process.memory_info().rss
    started = time.process_time()
    records = open_records(pattern)
    n_records = len(records)
    seconds = time.process_time() - started
    print((process.memory_info().rss - before) / n_records, seconds)


def meet_queue(folder: str, n_shards: str) -> None:
    """Meet shards that are written."""
    from seed_multimodal.pretokenize.inputs import Shard
    from seed_multimodal.pretokenize.run import ShardQueue

    shards = [Shard(f"{number:06d}", None) for number in range(int(n_shards))]  # type: ignore[arg-type]
    assert not list(ShardQueue(Path(folder), shards, 0))


def meet_group(world: str) -> None:
    """Print the open files of the first process of a training, and the most of the others."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        command = [sys.executable, __file__, "--part", "join", folder]
        processes = [
            subprocess.Popen(command, env={**os.environ, **address, **launched(rank, world)})
            for rank in range(int(world))
        ]
        assert not any(process.wait() for process in processes)
        n_open = {file.name: int(file.read_text()) for file in Path(folder).iterdir()}
        print(n_open.pop("0"), max(n_open.values()))


def launched(rank: int, world: str) -> dict[str, str]:
    """torchrun's variables of a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "OMP_NUM_THREADS": "1",
    }


def join(folder: str) -> None:
    """Join the group, and write how many files are open."""
    from seed_multimodal.training.distributed import ProcessGroup, join_processes

    join_processes("cpu", timeout_minutes=10)
    group = ProcessGroup()
    group.gather({"rank": group.rank})
    group.sum([1.0])
    n_open = len(os.listdir("/proc/self/fd"))
    (Path(folder) / str(group.rank)).write_text(str(n_open))
    group.sum([1.0])  # none ends before all have looked


PARTS: dict[str, Callable[..., None]] = {
    "open": open_all,
    "resident": resident,
    "queue": meet_queue,
    "group": meet_group,
    "join": join,
}


def fresh(arguments: list[str], *launcher: str) -> str:
    """What a part of this program prints in a process of its own."""
    command = [*launcher, sys.executable, __file__, "--part", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def traced_calls(folder: Path, arguments: list[str]) -> int:
    """Calls of files below a folder that a part makes."""
    with tempfile.NamedTemporaryFile("r") as trace:
        fresh(arguments, "strace", "-f", "-y", "-e", "trace=%file,getdents64", "-o", trace.name)
        return sum(str(folder) in line for line in trace)


# ---- folders


def write_tar(path: Path, n_records: int, members: dict[str, int]) -> None:
    """Records whose members have these bytes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(n_records):
            for extension, size in members.items():
                member = tarfile.TarInfo(f"{number:07d}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(b'{"image_ids": [1]}'.ljust(size)))


def link_copies(folder: Path, count: int, first: int = 0, digits: int = 5) -> None:
    """Further names of a shard."""
    for number in range(first + 1, first + count):
        os.link(folder / f"{first:0{digits}d}.tar", folder / f"{number:0{digits}d}.tar")


def index(folder: Path) -> None:
    """Write the indexes, as `seed data index`."""
    from seed_multimodal.data.formats.records import write_indexes

    write_indexes([folder], processes=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--folder", help="where the shards are written (default: /tmp)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *arguments = options.part
        PARTS[name](*arguments)
    else:
        main(options)
