"""Pre-tokenize a data set: each input shard becomes one output shard of JSON records with codes.

`SAVE_DIR/NAME.tar` is written atomically, with its counts in `NAME.counts.json`; existing shards are skipped. Under
torchrun each process handles every WORLD_SIZE-th shard, in a job array (`shard`) each task every N-th. Batches do not
cross shards, so equal input gives equal records.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.data.formats.shards import ShardWriter, open_shard
from seed_multimodal.data.pretokenize.dataset import Task, TaskDataset, decode_shards
from seed_multimodal.data.pretokenize.encode import Encoder, read_transform
from seed_multimodal.data.pretokenize.inputs import (
    InputSettings,
    Shard,
    list_shards,
    read_input_settings,
)
from seed_multimodal.data.pretokenize.record_types import RECORD_TYPES, RecordType
from seed_multimodal.device import DTYPES
from seed_multimodal.disk import read_json_object, replace_text, writable_folder
from seed_multimodal.entry import DONE, SOME_FAILED, log_line
from seed_multimodal.errors import ConfigError, DataError, pluralize
from seed_multimodal.progress import Progress
from seed_multimodal.settings import changed_settings, check_settings, setting


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run."""

    kind: str  # of output records, see `kinds.py`
    data: str | Mapping[str, Any]  # the input: a YAML file or a mapping
    save_dir: str
    tokenizer: str | Mapping[str, Any]  # this and the next three as in `encode.Encoder`
    device: str = "auto"
    dtype: str = setting("auto", choices=("auto", *sorted(DTYPES)))
    compile: bool = False  # compilation takes minutes
    fields: str | dict[str, str] | None = None  # overrides that of the data
    shard: tuple[int, int] = (0, 1)  # (index, count): every count-th shard, from `index` on
    image_transform: str | None = None  # YAML file; None: the tokenizer's transform
    batch_size: int | None = setting(
        None, minimum=1
    )  # samples decoded and images encoded per batch
    workers: int = setting(4, minimum=0)  # decode processes
    views: int = setting(
        1, minimum=1
    )  # views per image (kinds caption, qa and chat), augmented from `seed`
    seed: int = 0
    block: int = setting(10_000, minimum=1)  # records per output shard for other inputs than tars
    max_bad: int = setting(20, minimum=1)  # consecutive broken samples that stop the run


def run(settings: RunSettings) -> int:
    """Write this process's share of the shards; returns 1 if all shards exist and have no record. Raises SeedError."""
    check_settings(settings, "extraction")
    rank, world, device = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        settings.device,
    )
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = f"[{rank} of {world}] " if world > 1 else ""
    kind, source = read_input(settings)
    save_dir = writable_folder(settings.save_dir, DataError)
    shards = list_shards(source, settings.block)
    number, count = settings.shard
    share = shards[number::count][rank::world]
    left = [shard for shard in share if not (save_dir / f"{shard.name}.tar").exists()]
    log_line(
        f"{name}{pluralize(len(shards), 'shard')} of {source.files or source.format} as {kind.name} records to "
        f"{save_dir}: {len(share):,} in this share, {len(share) - len(left):,} of them exist already."
    )
    encoder = Encoder(settings.tokenizer, device, settings.dtype, settings.compile)
    transform = read_transform(settings.image_transform, encoder.transform)
    dataset = TaskDataset(kind, source, transform, settings.views, settings.seed)
    lists = {
        str(shard.file.path) for shard in shards if shard.stop is not None
    }  # edited lists have another size
    _agree(
        save_dir,
        {
            "kind": kind.name,
            "views": dataset.views,
            "seed": settings.seed,
            "block": settings.block,
            "input": {**asdict(source), "fields": kind.keys(source.fields), "image_root": None},
            "bytes": {
                os.path.basename(path): os.path.getsize(path)
                for path in sorted(lists)
                if os.path.isfile(path)
            },
            "transform": asdict(transform),
            "tokenizer": encoder.fingerprint,
        },
    )
    if left:
        batch = settings.batch_size or (
            32 if encoder.device.type == "cpu" else 256
        )  # 256 as in the original
        tasks = decode_shards(left, dataset, batch, settings.workers)
        with Progress(f"{name}extraction", len(left), "shard") as progress:
            progress.unit_scale = True  # show fractions of shards with two digits
            extractor = _Extractor(kind, encoder, batch, settings.max_bad, progress)
            for shard in left:
                extractor.make(save_dir / f"{shard.name}.tar", tasks)
    if all((save_dir / f"{shard.name}.tar").exists() for shard in shards):
        return _summarise(save_dir, shards)
    log_line(f"{name}{save_dir}: this share is finished; shards of others are missing.")
    return DONE


def read_input(settings: RunSettings) -> tuple[RecordType, InputSettings]:
    """The record kind and the input. Raises ConfigError."""
    kind = RECORD_TYPES[settings.kind]
    number, count = settings.shard
    if not 0 <= number < count:
        raise ConfigError(f"--shard {number}/{count}: must be I/N with I from 0 to N-1.")
    source = read_input_settings(settings.data, settings.fields)
    kind.keys(source.fields)
    return kind, source


class _Extractor:
    """Writes shards from decoded tasks, which arrive in shard order."""

    def __init__(
        self, kind: RecordType, encoder: Encoder, batch_size: int, max_bad: int, progress: Progress
    ) -> None:
        self.kind, self.encoder, self.batch_size = kind, encoder, batch_size
        self.max_bad, self.progress = max_bad, progress
        self.images = self._bad_in_a_row = 0

    def make(self, path: Path, tasks: Iterator[Task]) -> None:
        """Write a shard and its counts. Raises DataError: too many broken samples in a row."""
        counts = Counter[str]()
        with open_shard(path) as writer:
            for decoded in tasks:
                self._write(decoded, writer, counts)
                speed = self.images / max(self.progress.format_dict["elapsed"], 1e-9)
                self.progress.update(
                    decoded.share, done=f"{pluralize(self.images, 'image')} ({speed:,.0f}/s)"
                )
                if decoded.last:
                    break
            replace_text(path.with_name(f"{path.stem}.counts.json"), json.dumps(counts))

    def _write(self, decoded: Task, writer: ShardWriter, counts: Counter[str]) -> None:
        codes: list[list[int]] = []
        for batch in decoded.pixels.split(self.batch_size) if len(decoded.pixels) else ():
            codes += self.encoder(batch)
        self.images += len(codes)
        counts.update({"read": len(decoded.samples), "images": len(codes)})
        for sample in decoded.samples:
            counts["lost images"] += len(sample.lost)
            for message in sample.lost:
                self.progress.write_line(f"dropped from its document: {message}")
            self._bad_in_a_row = self._bad_in_a_row + 1 if sample.bad else 0
            if sample.bad:
                counts["bad"] += 1
                self.progress.write_line(f"skipped: {sample.bad}")
                if self._bad_in_a_row >= self.max_bad:
                    raise DataError(
                        f"{sample.bad} ({pluralize(self._bad_in_a_row, 'broken sample')} in a row)"
                    )
            elif sample.dropped:
                counts[f"dropped: {sample.dropped}"] += 1
            else:
                found = [
                    None if rows is None else [codes[row] for row in rows] for rows in sample.rows
                ]
                writer.add(
                    f"{sample.number:07d}",
                    {"json": _strict_json(self.kind.record(sample.fields, found))},
                )
                counts["samples"] += 1


def _agree(save_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder's settings, or compare them with the stored ones. Raises DataError: changed settings."""
    file = save_dir / "settings.json"
    if not file.exists():
        replace_text(file, json.dumps(settings, indent=1))
    changes = changed_settings(read_json_object(file, DataError), json.loads(json.dumps(settings)))
    if changes:
        raise DataError(
            f"{save_dir}: was started with other settings ({'; '.join(changes)}); use another --save_dir "
            "or the same settings."
        )


def _summarise(save_dir: Path, shards: list[Shard]) -> int:
    """Write and log the counts of all shards."""
    total = Counter(shards=len(shards))
    for shard in shards:
        total.update(read_json_object(save_dir / f"{shard.name}.counts.json", DataError))
    replace_text(save_dir / "counts.json", json.dumps(total, indent=1))
    log_line(f"{save_dir}: {', '.join(f'{key} {number:,}' for key, number in total.items())}.")
    if not total["samples"]:
        log_line(f"{save_dir}: no record was written; delete this folder before the next run.")
    return DONE if total["samples"] else SOME_FAILED


def _strict_json(value: Mapping[str, Any]) -> bytes:
    """JSON with NaN (in LAION's metadata) replaced by null."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return _strict_json(json.loads(json.dumps(value), parse_constant=lambda name: None))
    return text.encode("utf-8", "replace")
