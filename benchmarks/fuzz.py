"""Damage files at random, and read them: no reader may crash, hang or raise an unknown error.

    python benchmarks/fuzz.py --minutes 60                   all readers
    python benchmarks/fuzz.py --minutes 5 --targets parquet safetensors

Damaged are bytes of each kind of file, and values of those that are JSON (`damage.py`). `images`
sends images of odd sizes (1x1, 1xN) and kinds, whole and damaged, to every route of the shipped
systems. `gguf` needs llama.cpp. Prints a JSON line for each target; the exit code is 1 after a
crash (of the process that reads), a hang, or an error that is no `SeedError`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import (
    damage_bytes,
    damage_json,
    damage_lines,
    damage_safetensors,
    damage_tar,
    damage_torch,
)
from image_routes import ImageRoutes
from PIL import Image
from shared import ROOT, input_images, plain_parser, print_line, start

from seed_multimodal.device import choose_device
from seed_multimodal.entry import kill_with_parent
from seed_multimodal.errors import CheckpointError, SeedError
from seed_multimodal.images.io import image_to_bytes

# Limits of one case. A busy machine makes a case slow, so processor time counts first.
HANG_CPU_SECONDS = 60
HANG_SECONDS = 900
SAMPLES = [
    {"image_ids": [1, 2, 3] * 10, "text": "a red fox"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"image": "a.png", "caption": ["one", "two"], "boxes": [[0.1, 0.2, 0.3, 0.4]]},
] * 4


# ---- readers


def read_records(file: Path) -> None:
    """All records of a data file, as a training reads them."""
    from seed_multimodal.data.formats.sources import open_records

    records = open_records(file, cache=False)
    for index in range(min(len(records), 50)):
        try:
            records.read(index)
        except SeedError as error:
            accepted(error)


def read_weights(file: Path) -> None:
    from seed_multimodal.weights import load_state_dict

    load_state_dict(file)


def read_torch(file: Path) -> None:
    """The process that reads the pickle must not be ended by it."""
    try:
        read_weights(file)
    except CheckpointError as error:
        if "its reader was stopped" in str(error):
            raise AssertionError(str(error)) from error
        raise


def read_system(file: Path) -> None:
    from seed_multimodal.pipelines.config import SystemConfig

    SystemConfig.find(file.parent).require("llm", "tokenizer")


def read_image(file: Path) -> None:
    from seed_multimodal.images.io import open_image

    open_image(file)


def read_gguf(file: Path) -> None:
    from seed_multimodal.inference.backends.llama_cpp import LlamaCppBackend
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    tokenizer = MultimodalTokenizer.from_pretrained(ROOT / "pretrained" / "nano" / "seed_tokenizer")
    LlamaCppBackend(file.parent, tokenizer.vocabulary, file, max_rows=1)


def accepted(error: SeedError) -> None:
    """An error of the kind that readers may raise: it must be a sentence."""
    if not str(error).strip():
        raise AssertionError("an error without a message") from error


@dataclass(frozen=True)
class Reader:
    """A target: the file `name`, made by `sample`, how it is damaged, and what reads it.

    damaged: the file that is damaged, if it is not the one that is read.
    """

    name: str
    sample: Callable[[Path], object]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    damaged: Callable[[Path], Path] = lambda file: file

    def cases(self, folder: Path) -> Callable[[random.Random], None]:
        """A function that reads one damaged file."""
        file = folder / self.name
        self.sample(file)
        target = self.damaged(file)
        content = target.read_bytes()

        def case(rng: random.Random) -> None:
            target.write_bytes(self.damage(content, rng))
            self.read(file)

        return case


def write_lines(file: Path) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in SAMPLES))


def write_parquet(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "a fox", "image": b"abc", "ids": [1, 2]}] * 20)
    pyarrow.parquet.write_table(table, file, row_group_size=7)


def write_tar(file: Path) -> None:
    from seed_multimodal.data.formats.shards import write_shard

    image = image_to_bytes(Image.new("RGB", (8, 8)))
    rows = [{"json": json.dumps(record).encode(), "png": image} for record in SAMPLES]
    write_shard(file, [(f"{index:05d}", row) for index, row in enumerate(rows)])


def write_indexed_tar(file: Path) -> None:
    from seed_multimodal.data.formats.tar import TarFile

    write_tar(file)
    TarFile(file).write_index()


def index_of(file: Path) -> Path:
    from seed_multimodal.data.formats.index import index_path

    return Path(index_path(str(file)))


def write_weights(file: Path) -> None:
    import torch

    from seed_multimodal.weights import save_state_dict, save_torch

    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0)}
    if file.suffix == ".safetensors":
        save_state_dict(tensors, file)
    elif file.suffix == ".pth":  # as torch wrote before 1.6
        torch.save({"model": tensors}, file, _use_new_zipfile_serialization=False)
    else:
        save_torch({"model": tensors, "step": 3}, file)


def write_gguf(file: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny.language import llama

    from seed_multimodal.inference.gguf import export_gguf
    from seed_multimodal.language.tokenizer import MultimodalTokenizer

    tokenizer = ROOT / "pretrained" / "nano" / "seed_tokenizer"
    size = MultimodalTokenizer.from_pretrained(tokenizer).vocabulary.size
    llama(size).save_pretrained(file.parent)
    export_gguf(file.parent, tokenizer, file, "f16")


def copy_system(file: Path) -> None:
    file.write_bytes((ROOT / "pretrained" / "nano" / "system.json").read_bytes())


def write_image(file: Path) -> None:
    input_images(1)[0].resize((64, 48)).save(file)


READERS = {
    "tar": Reader("a.tar", write_tar, damage_tar, read_records),
    "tar index": Reader("a.tar", write_indexed_tar, damage_bytes, read_records, index_of),
    "jsonl": Reader("a.jsonl", write_lines, damage_lines, read_records),
    "json": Reader(
        "a.json", lambda f: f.write_text(json.dumps(SAMPLES)), damage_json, read_records
    ),
    "parquet": Reader("a.parquet", write_parquet, damage_bytes, read_records),
    "safetensors": Reader("a.safetensors", write_weights, damage_safetensors, read_weights),
    "torch": Reader("a.bin", write_weights, damage_torch, read_torch),
    "torch legacy": Reader("a.pth", write_weights, damage_bytes, read_torch),
    "system.json": Reader("system.json", copy_system, damage_json, read_system),
    "image": Reader("a.png", write_image, damage_bytes, read_image),
    "gguf": Reader("a.gguf", write_gguf, damage_bytes, read_gguf),
}


# ---- a target for some time


def fuzz(target: str, folder: Path, first: int, seed: int, seconds: float) -> None:
    """Read case after case; problems and the number of the case are written into the folder."""
    warnings.simplefilter("ignore")
    problems: set[str] = set()
    case = ImageRoutes().case if target == "images" else READERS[target].cases(folder)
    number = os.open(folder / "case", os.O_WRONLY | os.O_CREAT)
    deadline = time.monotonic() + seconds
    index = first
    while time.monotonic() < deadline:
        os.pwrite(number, b"%12d" % index, 0)
        signal.setitimer(signal.ITIMER_PROF, HANG_CPU_SECONDS)
        signal.alarm(HANG_SECONDS)
        try:
            case(random.Random(f"{target} {seed} {index}"))
        except SeedError as error:
            accepted(error)
        except BaseException as error:  # noqa: BLE001 what this program looks for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__} in {frame.filename}:{frame.lineno}"
            if problem not in problems:
                problems.add(problem)
                with open(folder / "problems", "a") as file:
                    file.write(f"{problem}: case {index}: {str(error)[:300]!r}\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        index += 1
    os.pwrite(number, b"%12d" % index, 0)


def measure(target: str, folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Figures of a target; a crash ends only the process that reads."""
    folder.mkdir()
    crashes: list[str] = []
    deadline = time.monotonic() + seconds
    index = 0
    while (left := deadline - time.monotonic()) > 0 and len(crashes) < 20:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                kill_with_parent()
                fuzz(target, folder, index, seed, left)
                code = 0
            except BaseException:  # noqa: BLE001 the copy of this program must not go on
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        case = folder / "case"
        index = int(case.read_text()) if case.exists() else 0
        if code:
            hangs = code in (-signal.SIGALRM, -signal.SIGPROF)
            kind = "hang" if hangs else f"exit code {code}"
            crashes.append(f"{kind}: case {index}")
            index += 1
    file = folder / "problems"
    errors = file.read_text().splitlines() if file.exists() else []
    return {"cases": index, "crashes": crashes, "unknown_errors": errors}


def run(options: argparse.Namespace) -> int:
    runtime = choose_device("cpu", log=None)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for target in options.targets:
            seconds = 60 * options.minutes / len(options.targets)
            results = measure(target, Path(folder) / target, options.seed, seconds)
            settings = {"target": target, "seconds": seconds, "seed": options.seed}
            print_line("fuzz", options, runtime, settings, results)
            failed = failed or bool(results["crashes"] or results["unknown_errors"])
    return int(failed)


if __name__ == "__main__":
    names = [*READERS, "images"]
    available = [name for name in names if name != "gguf" or importlib.util.find_spec("llama_cpp")]
    parser = plain_parser(__doc__)
    parser.add_argument("--targets", nargs="+", default=available, choices=names)
    parser.add_argument("--minutes", type=float, default=60, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    start(run, parser)
