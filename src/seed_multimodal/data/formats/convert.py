"""The released pickled shards -> shards of json, once: `seed data convert OLD... --out DIR`.

Each shard is converted independently: same keys in the same order, written whole or not at all, the same bytes in every
run. `manifest.json` in DIR lists what is done (samples, bytes, sha256), so that a second run continues an interrupted
one. A shard with a refused sample is left out, unless `skip_bad` leaves out the sample alone.
"""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.files import find_files
from seed_multimodal.data.formats.pickled import read_pickle
from seed_multimodal.data.formats.record import BadRecord, parse_object
from seed_multimodal.data.formats.records import PICKLED
from seed_multimodal.data.formats.tar import OpenFiles, tar_records
from seed_multimodal.data.formats.tar_headers import Damaged
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.disk import folder_lock, replace_text, sha256_of, writing
from seed_multimodal.entry import end_with_parent, log_line
from seed_multimodal.errors import ConfigError, DataError, SeedError
from seed_multimodal.progress import Progress

MANIFEST = "manifest.json"


@dataclass
class ShardReport:
    """Result of one shard; `name` is its path below the output folder."""

    name: str
    source: str
    source_bytes: int
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    skipped: list[str] = field(default_factory=list)


@dataclass
class ConvertReport:
    """Result of a run: shards converted now, already done, refused (a sentence each); `samples` over all that are
    done."""

    converted: int = 0
    kept: int = 0
    samples: int = 0
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def convert_shards(
    tars: Sequence[str | Path],
    out: str | Path,
    *,
    skip_bad: bool = False,
    force: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> ConvertReport:
    """Convert tars (patterns, folders) into `out`, keeping their folders below the common one.

    Args:
        skip_bad: leave out refused samples (they are named and counted) instead of their whole shard.
        force: convert again what is done by the manifest.
        workers: processes.

    Raises:
        DataError: no such tars, or a manifest that is damaged. ConfigError: the output was made from other shards.
    """
    out = Path(out)
    jobs = _names(tars, out)
    with folder_lock(out, DataError, "converting into this folder"):
        return _convert(jobs, out, skip_bad, force, workers, progress)


def _convert(jobs: dict[str, Path], out: Path, skip_bad: bool, force: bool, workers: int,
             progress: bool) -> ConvertReport:
    done = _read_manifest(out)
    report = ConvertReport()
    left = {}
    for name, path in jobs.items():
        entry = done.get(name)
        if entry is not None and entry["source"] != str(path) and not force:
            raise ConfigError(f"{out / name}: was made from {entry['source']}, not from {path}; give another --out, or "
                              "--force to write over it.")
        if entry is not None and not force and _is_done(entry, path, out / name):
            report.kept += 1
            report.skipped += entry["skipped"]
        else:
            left[name] = path
    written = time.monotonic()
    try:
        for name, result in _run(left, out, skip_bad, workers, progress):
            if isinstance(result, str):
                done.pop(name, None)
                report.refused.append(result)
            else:
                done[name] = asdict(result)
                report.converted += 1
                report.skipped += result.skipped
            if time.monotonic() - written > 2:  # with thousands of shards it is a long file
                _write_manifest(out, done)
                written = time.monotonic()
    finally:
        _write_manifest(out, done)
    report.samples = sum(done[name]["samples"] for name in jobs if name in done)
    report.refused.sort()
    return report


def _names(tars: Sequence[str | Path], out: Path) -> dict[str, Path]:
    """Each shard by its path below the common folder; files in `out` are no input."""
    paths = [path for path, _ in find_files(tars, "tar") if not path.resolve().is_relative_to(out.resolve())]
    if not paths:
        raise DataError(f"{out}: holds all the shards that are to be converted; give another --out.")
    folders = [Path(one).absolute() for one in tars if Path(one).is_dir()]
    folders += [path.absolute().parent for path in paths if not any(path.absolute().is_relative_to(f) for f in folders)]
    base = os.path.commonpath(folders)
    return {path.absolute().relative_to(base).as_posix(): path for path in paths}


def convert_shard(path: Path, target: Path, name: str, skip_bad: bool = False) -> ShardReport:
    """Convert one shard.

    Raises:
        DataError: naming the shard and the sample that is refused, or where the tar is torn.
    """
    report = ShardReport(name, str(path), path.stat().st_size)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # of a run that was killed
        left.unlink()
    try:
        with writing(target, DataError):
            report.samples = write_shard(target, _samples(path, report, skip_bad))
    except ValueError as error:  # a name that does not fit a tar's header
        raise DataError(f"{target}: cannot be written ({error}).") from None
    if not report.samples:
        target.unlink()
        raise DataError(f"{path}: holds no sample that can be converted.")
    report.bytes = target.stat().st_size
    report.sha256 = sha256_of(target)
    return report


def _samples(path: Path, report: ShardReport, skip_bad: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"json": bytes}) of each sample; other members (pictures) are carried along as they are."""
    files = OpenFiles(limit=1)
    key = ""
    try:
        for record in tar_records(path):
            key = record.key
            try:
                if record.problem is not None:
                    raise BadRecord(*record.problem)
                yield key, _converted({extension: record.member(extension, files=files) or b""
                                       for extension in record.members}, record.where)
            except BadRecord as error:
                if not skip_bad:
                    raise
                report.skipped.append(str(error))
    except Damaged as error:
        after = f"after sample {key}" if key else "in its first sample"
        raise DataError(f"{path}: torn or damaged {after} ({error}).") from None
    finally:
        files.close()


def _converted(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    pickles = [extension for extension in members if extension in PICKLED]
    if not pickles and "json" in members:  # a shard that was converted before
        parse_object(members["json"], where)
        return members
    if len(pickles) != 1 or "json" in members:
        raise BadRecord("missing member", f"{where}: has {', '.join(sorted(members))}; one .pkl member was expected.")
    value = read_pickle(members[pickles[0]], f"{where}.{pickles[0]}")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise BadRecord("wrong type", f"{where}: a text holds half of a surrogate pair.") from None
    return {"json": text} | {extension: data for extension, data in members.items() if extension not in PICKLED}


def _one(path: Path, target: Path, name: str, skip_bad: bool) -> ShardReport | str:
    """`convert_shard` in a worker; a refusal is returned as its sentence."""
    try:
        return convert_shard(path, target, name, skip_bad)
    except SeedError as error:
        return str(error)


def _run(jobs: dict[str, Path], out: Path, skip_bad: bool, workers: int,
         progress: bool) -> Iterator[tuple[str, ShardReport | str]]:
    with Progress("convert", len(jobs), "shard", log=log_line if progress else None) as bar:
        if workers <= 1 or len(jobs) <= 1:
            for name, path in jobs.items():
                yield name, _one(path, out / name, name, skip_bad)
                bar.update()
            return
        # Spawned processes: this one may hold threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=end_with_parent) as pool:
            running = {pool.submit(_one, path, out / name, name, skip_bad): name for name, path in jobs.items()}
            for future in as_completed(running):
                try:
                    yield running[future], future.result()
                except BrokenProcessPool:
                    raise DataError(f"{out}: a conversion process was killed (often because memory ran out); the same "
                                    "command goes on.") from None
                bar.update()


def _is_done(entry: dict[str, Any], source: Path, target: Path) -> bool:
    return bool(entry["source_bytes"] == source.stat().st_size and target.is_file()
                and entry["bytes"] == target.stat().st_size and entry["sha256"] == sha256_of(target))


def _read_manifest(out: Path) -> dict[str, dict[str, Any]]:
    path = out / MANIFEST
    try:
        content = parse_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    known = set(ShardReport.__dataclass_fields__)
    shards = content.get("shards")
    if not isinstance(shards, list) or not all(isinstance(one, dict) and set(one) == known for one in shards):
        raise DataError(f"{path}: is no manifest of converted shards; give another --out, or delete it.")
    return {one["name"]: one for one in shards}


def _write_manifest(out: Path, done: dict[str, dict[str, Any]]) -> None:
    shards = [done[name] for name in sorted(done)]
    content = {"shards": shards, "samples": sum(one["samples"] for one in shards),
               "skipped": sum(len(one["skipped"]) for one in shards)}
    with writing(out / MANIFEST, DataError):
        replace_text(out / MANIFEST, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
