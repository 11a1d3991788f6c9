"""Pre-tokenize a data set: each input shard becomes one output shard of JSON records with codes.

`SAVE_DIR/NAME.tar` is written atomically, with its counts in `NAME.counts.json`; existing shards
are skipped, and refused if their input has changed. Any number of processes may work on a folder:
each writes the next shard whose lock is free, and begins with its share (`shard`, and its rank
under torchrun). Object stores have no locks: there it writes its share only. Batches do not cross
shards, so equal input gives equal records.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.data.formats import manifest
from seed_multimodal.data.formats.bad_records import BROKEN, REPAIRED, BadRecords, RecordNote
from seed_multimodal.data.formats.record import JsonObject, RecordFile
from seed_multimodal.data.formats.shards import ShardWriter, open_shard
from seed_multimodal.data.formats.storage import (
    download,
    filesystem,
    is_remote,
    read_safely,
    remote_files,
    upload,
)
from seed_multimodal.device import DTYPES
from seed_multimodal.disk import (
    read_json_object,
    replace_text,
    strict_json,
    try_lock,
    writable_folder,
)
from seed_multimodal.entry import DONE, SOME_FAILED, log_line, rank_and_world_size
from seed_multimodal.errors import ConfigError, DataError, pluralize
from seed_multimodal.pretokenize.dataset import EncodedViews, Task, TaskDecoder, decode_shards
from seed_multimodal.pretokenize.encode import Encoder, read_transform
from seed_multimodal.pretokenize.inputs import (
    InputSettings,
    InputStates,
    Shard,
    list_shards,
    read_input_settings,
)
from seed_multimodal.pretokenize.record_types import (
    RECORD_TYPES,
    RecordType,
    joined,
    replace_images,
)
from seed_multimodal.progress import Progress
from seed_multimodal.settings import (
    IDENTITY,
    check_identity,
    check_settings,
    non_negative,
    positive,
    setting,
)

Codes = list[int]  # of an image
COUNTS = "counts.json"  # of all shards
INPUT = "input"  # beside the counts of a shard: the state of what it was made of
SHOWN = 10  # changed shards in an error
ENDS = (".tar", ".counts.json")  # of the files of a shard; at a URL the last one completes it


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run."""

    kind: str  # of output records, see `record_types`
    data: str | Mapping[str, Any]  # the input: a YAML file or a mapping
    save_dir: str  # a folder, or the URL of one
    tokenizer: str | Mapping[str, Any]  # this and the next three as in `encode.Encoder`
    device: str = "auto"
    dtype: str = setting("auto", choices=("auto", *sorted(DTYPES)))
    compile: bool = False  # compilation takes minutes
    fields: str | dict[str, str] | None = None  # overrides that of the data
    # (index, count): begin with every count-th shard, from `index` on
    shard: tuple[int, int] = (0, 1)
    image_transform: str | None = None  # YAML file; None: the tokenizer's transform
    # samples decoded and images encoded per batch
    batch_size: int | None = positive(None)
    workers: int = non_negative(4)  # decode processes
    # views per image (kinds caption, qa and chat), augmented from `seed`
    views: int = positive(1)
    seed: int = 0
    block: int = positive(10_000)  # records per output shard for other inputs than tars
    max_bad: int = positive(20)  # consecutive broken samples that stop the run


def run(settings: RunSettings) -> int:
    """Write the shards that nobody else writes; returns 1 if all shards exist and have no record.

    Raises SeedError.
    """
    check_settings(settings, "extraction")
    if not is_remote(settings.save_dir):
        return _run(settings, settings.save_dir)
    url = _output_url(settings.save_dir)
    log_line(f"{url}: object stores have no locks, so this process writes its own share only.")
    with tempfile.TemporaryDirectory(prefix="seed-shards-") as folder:
        return _run(settings, folder, url)


def _output_url(name: str) -> str:
    """The URL as its file system spells it.

    Raises ConfigError: shards cannot be written to it and listed; DataError: unknown.
    """
    if name.startswith("http") or "::" in name:
        raise ConfigError(
            f"--save_dir {name}: web servers and chained URLs are only read; name a folder, or the "
            "URL of one in an object store, such as s3://BUCKET/FOLDER."
        )
    files, root = read_safely(name, lambda: filesystem(name))
    return str(files.unstrip_protocol(root))


def _run(settings: RunSettings, folder: str, url: str = "") -> int:
    # 1. This process and its GPU.
    rank, world = rank_and_world_size()
    device = settings.device
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    prefix = f"[{rank} of {world}] " if world > 1 else ""

    # 2. The shards, its share first, then those of the others.
    record_type, source = read_input(settings)
    save_dir = writable_folder(folder, DataError)
    shards = list_shards(source, settings.block)
    job, n_jobs = settings.shard
    index, count = job + n_jobs * rank, n_jobs * world
    shares = [shards[(index + offset) % count :: count] for offset in range(count)]
    queue = ShardQueue(save_dir, [*chain.from_iterable(shares)], len(shares[0]), url)
    n_missing = queue.count_missing()
    log_line(
        f"{prefix}{pluralize(len(shards), 'shard')} of {source.files or source.format} as "
        f"{record_type.name} records to {url or save_dir}: {len(shares[0]):,} in this share, "
        f"{len(shards) - n_missing:,} of all exist already."
    )

    # 3. The encoder; existing shards must have been written with the same settings.
    encoder = Encoder(settings.tokenizer, device, settings.dtype, settings.compile)
    transform = read_transform(settings.image_transform, encoder.transform)
    decoder = TaskDecoder(record_type, source, transform, settings.views, settings.seed)
    used = {
        "kind": record_type.name,
        "views": decoder.views,
        "seed": settings.seed,
        "block": settings.block,
        "input": {**asdict(source), "fields": record_type.keys(source.fields), "image_root": None},
        "bytes": _list_sizes(shards),
        "transform": transform.describe(),
        "tokenizer": encoder.fingerprint,
    }
    check_identity(save_dir, used, "--save_dir")
    if url:
        # The first of several processes uploads its settings, all compare.
        upload(save_dir / IDENTITY, f"{url}/{IDENTITY}", "xb")
        download(url, [IDENTITY], save_dir)
        check_identity(save_dir, used, "--save_dir", label=url)
    queue.check_inputs()

    # 4. Write the missing shards.
    if n_missing:
        (save_dir / COUNTS).unlink(missing_ok=True)  # of the shards before
        # 256 as in the original.
        batch_size = settings.batch_size or (32 if encoder.device.type == "cpu" else 256)
        with (
            closing(queue),
            closing(decode_shards(queue, decoder, batch_size, settings.workers)) as tasks,
            Progress(f"{prefix}extraction", n_missing, "shard") as progress,
        ):
            progress.unit_scale = True  # show fractions of shards with two digits
            bad = BadRecords(settings.max_bad, progress.write_line, "skipped: ")
            writer = _RecordWriter(encoder, batch_size, bad, progress)
            for task in tasks:
                state = queue.input_state(task.shard)
                writer.write_shard(queue.path(task.shard), chain([task], tasks), state)
                queue.release(task.shard)
    if not queue.count_missing():
        return _summarise(queue)
    log_line(f"{prefix}{url or save_dir}: this share is finished; other processes write the rest.")
    return DONE


@dataclass
class ShardQueue:
    """The shards that are not written yet, each locked until `release` or `close`.

    n_own: first ones, which are written also where the file system has no locks.
    url: where finished files are uploaded; `save_dir` is then temporary.
    """

    save_dir: Path
    shards: Sequence[Shard]
    n_own: int
    url: str = ""
    # of shards that this process has begun
    _locks: dict[str, ExitStack] = field(default_factory=dict)
    inputs: InputStates = field(default_factory=InputStates)

    def path(self, name: str) -> Path:
        """The file of a shard."""
        return self.save_dir / f"{name}.tar"

    def list_written(self) -> set[str]:
        """Names of the written shards; at a URL of those whose counts are there, too."""
        files = self._list_files()
        ends = ENDS if self.url else ENDS[:1]
        return {
            shard.name
            for shard in self.shards
            if all(f"{shard.name}{end}" in files for end in ends)
        }

    def _list_files(self) -> set[str]:
        """The files of the shards, by one listing of each output folder, or of the URL."""
        if self.url:
            urls = remote_files(self.url, "find")
            return {url.removeprefix(f"{self.url}/") for url in urls}
        files = set[str]()
        for folder in {os.path.dirname(shard.name) for shard in self.shards}:
            with suppress(FileNotFoundError):
                names = os.listdir(self.save_dir / folder)
                files.update(os.path.join(folder, name) for name in names)
        return files

    @cached_property
    def _files(self) -> dict[str, RecordFile]:
        return {shard.name: shard.file for shard in self.shards}

    def input_state(self, name: str) -> JsonObject:
        """What is kept beside the counts of a shard, see `InputStates`."""
        return self.inputs.state(self._files[name])

    def check_inputs(self) -> None:
        """Raise DataError if the input of a written shard of this share has changed since."""
        # Without its counts, or with those of an earlier version, a shard is taken as it is.
        files = self._list_files()
        names = [shard.name for shard in self.shards[: self.n_own]]
        own = [name for name in names if all(f"{name}{end}" in files for end in ENDS)]
        changed: list[str] = []
        for name, counts in self.read_counts(own).items():
            before = counts.get(INPUT)
            if before is not None and not self.inputs.is_same(self._files[name], before):
                changed.append(f"{name}.tar")
        if changed:
            more = " …" if len(changed) > SHOWN else ""
            raise DataError(
                f"{self.url or self.save_dir}: the input of {pluralize(len(changed), 'shard')} "
                f"has changed since: {', '.join(changed[:SHOWN])}{more}; delete these shards to "
                "make them again, or use another --save_dir."
            )

    def read_counts(self, names: Sequence[str]) -> dict[str, JsonObject]:
        """The counts of written shards, and under `INPUT` what they were made of."""
        if self.url and names:
            download(self.url, [f"{name}.counts.json" for name in names], self.save_dir)
        files = {name: self.save_dir / f"{name}.counts.json" for name in names}
        return {name: read_json_object(file, DataError) for name, file in files.items()}

    def count_missing(self) -> int:
        """The number of shards that are not written yet."""
        return len(self.shards) - len(self.list_written())

    def __iter__(self) -> Iterator[Shard]:
        # Again from the start, because a process that had a shard may have been killed.
        n_before = -1
        while len(self._locks) > n_before:
            n_before = len(self._locks)
            written = self.list_written()
            is_stale = False
            for index, shard in enumerate(self.shards):
                # The others have written many of their shards while this process wrote its own.
                if is_stale and index >= self.n_own:
                    written = self.list_written()
                    is_stale = False
                if shard.name in self._locks or shard.name in written:
                    continue
                if self._begin(shard, is_own=index < self.n_own):
                    yield shard
                    is_stale = True

    def _begin(self, shard: Shard, is_own: bool) -> bool:
        """Lock a shard; False: another process writes it, or has just written it."""
        if self.url and not is_own:
            return False
        with ExitStack() as stack:
            lock = self._lock_file(shard.name)
            is_held = stack.enter_context(try_lock(lock.parent, DataError, lock.name))
            if is_held and self.path(shard.name).exists():
                lock.unlink(missing_ok=True)
            elif is_held or (is_held is None and is_own):
                self._locks[shard.name] = stack.pop_all()
        return shard.name in self._locks

    def _lock_file(self, name: str) -> Path:
        path = self.path(name)
        return path.with_name(f".{path.name}.lock")

    def release(self, name: str) -> None:
        """Unlock a shard that is written; who locks it later sees that."""
        if self.url:
            for end in ENDS:
                upload(self.save_dir / f"{name}{end}", f"{self.url}/{name}{end}")
            self.path(name).unlink()
        self._lock_file(name).unlink(missing_ok=True)
        self._locks[name].close()

    def close(self) -> None:
        """Unlock all shards."""
        for lock in self._locks.values():
            lock.close()


def read_input(settings: RunSettings) -> tuple[RecordType, InputSettings]:
    """The record type and the input. Raises ConfigError."""
    record_type = RECORD_TYPES[settings.kind]
    job, n_jobs = settings.shard
    if not 0 <= job < n_jobs:
        raise ConfigError(f"--shard {job}/{n_jobs}: must be I/N with I from 0 to N-1.")
    source = read_input_settings(settings.data, settings.fields)
    record_type.keys(source.fields)
    return record_type, source


def _list_sizes(shards: list[Shard]) -> dict[str, int]:
    """Bytes of each list that is divided into shards; an edited list has another size."""
    paths = {str(shard.file.path) for shard in shards if shard.stop is not None}
    return {
        os.path.basename(path): os.path.getsize(path)
        for path in sorted(paths)
        if os.path.isfile(path)
    }


@dataclass
class _RecordWriter:
    """Writes shards from decoded tasks, which arrive in shard order."""

    encoder: Encoder
    batch_size: int
    bad: BadRecords
    progress: Progress
    images: int = 0

    def write_shard(self, path: Path, tasks: Iterator[Task], input_state: JsonObject) -> None:
        """Write a shard, its counts and its `INPUT`. Raises DataError: too many broken samples in a
        row."""
        counts = Counter[str]()
        with open_shard(path) as shard:
            for task in tasks:
                self._write_task(task, shard, counts)
                speed = self.images / max(self.progress.format_dict["elapsed"], 1e-9)
                done = f"{pluralize(self.images, 'image')} ({speed:,.0f}/s)"
                self.progress.update(task.share, done=done)
                if task.last:
                    break
            text = json.dumps({**counts, INPUT: input_state})
            replace_text(path.with_name(f"{path.stem}.counts.json"), text)

    def _write_task(self, task: Task, shard: ShardWriter, counts: Counter[str]) -> None:
        # 1. Encode all images of the task.
        codes: list[Codes] = []  # of each pixel row
        if task.pixels is not None and len(task.pixels):
            for batch in task.pixels.split(self.batch_size):
                codes += self.encoder(batch)
        self.images += len(codes)
        counts.update({"read": len(task.samples), "images": len(codes)})

        # 2. A record for each sample that is neither broken nor dropped.
        for sample in task.samples:
            counts["lost images"] += len(sample.lost_images)
            for message in sample.lost_images:
                self.bad.add(RecordNote(REPAIRED, "dropped from its document", message))
            note = sample.note
            is_broken = note is not None and note.kind == BROKEN
            if not is_broken:
                self.bad.in_a_row = 0
            if note is not None:
                counts["bad" if is_broken else f"{note.kind}: {note.reason}"] += 1
                self.bad.add(note)
            if sample.record is None:
                continue
            record = replace_images(sample.record, EncodedViews, partial(_view_codes, codes))
            # Metadata of LAION has numbers that are not finite.
            record = joined(record)
            content = strict_json(record, ensure_ascii=False, separators=(",", ":"))
            shard.add(f"{sample.index:07d}", {"json": content.encode("utf-8", "replace")})
            counts["samples"] += 1


def _view_codes(codes: Sequence[Codes], views: EncodedViews) -> Codes | list[Codes]:
    """The codes of an image; of several views, a list for each."""
    view_codes = [codes[row] for row in views.rows]
    return view_codes if len(view_codes) > 1 else view_codes[0]


def _summarise(queue: ShardQueue) -> int:
    """Write and log the counts of all shards; write the manifest of the folder."""
    path = queue.save_dir / COUNTS
    target = queue.url or queue.save_dir
    total = Counter[str]()
    if path.exists():
        total.update(read_json_object(path, DataError))
    if total["shards"] != len(queue.shards):
        total = Counter(shards=len(queue.shards))
        names = [shard.name for shard in queue.shards]
        n_records = {}
        for name, counts in queue.read_counts(names).items():
            counts.pop(INPUT, None)
            total.update(counts)
            n_records[f"{target}/{name}.tar"] = counts.get("samples", 0)
        replace_text(path, json.dumps(total, indent=1))
        if queue.url:
            upload(path, f"{queue.url}/{COUNTS}")
        manifest.write(n_records)
    summary = ", ".join(f"{key} {count:,}" for key, count in total.items())
    log_line(f"{target}: {summary}.")
    if not total["samples"]:
        log_line(f"{target}: no record was written; delete this folder before the next run.")
    return DONE if total["samples"] else SOME_FAILED
