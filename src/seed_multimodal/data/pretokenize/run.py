"""Pre-tokenise a data set: input shards → codes → tars of json records, on any number of processes.

    run(RunSettings(kind="caption", data="configs/data/caption_torchdata_preprocess.yaml", save_dir="dataset/cc3m",
                    encoder=EncoderSettings("configs/tokenizer/seed_llama_tokenizer.yaml"), gpus=8))

Every unit of work (an input shard, or a block of records) becomes one folder `part-XXXX`, which depends on the unit
alone, so processes need not communicate: those of one machine are spawned here (`gpus`), those of several come from
torchrun's environment or a job array (`shard`). A run that was interrupted in any way continues with the units that are
not finished.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.data.pretokenize import RELEASED_BATCH, RELEASED_GPUS
from seed_multimodal.data.pretokenize.decode import TaskDecoder
from seed_multimodal.data.pretokenize.encode import Encoder, EncoderSettings, read_transform
from seed_multimodal.data.pretokenize.input_settings import InputSettings, read_input_settings
from seed_multimodal.data.pretokenize.kinds import get_kind
from seed_multimodal.data.pretokenize.output import (
    CHANGED,
    agree_on_settings,
    check_part,
    merge,
    part_folder,
    refuse_other_settings,
    summary,
    versions,
)
from seed_multimodal.data.pretokenize.units import Unit, list_units
from seed_multimodal.data.pretokenize.work import Extractor
from seed_multimodal.disk import writing
from seed_multimodal.entry import DONE, REFUSED, SOME_FAILED, end_with_parent, guarded, log_line
from seed_multimodal.errors import ConfigError, DataError, counted
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_settings, setting

CPU_BATCH = 32  # what is fastest there


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        kind: of records, see `kinds.py`.
        data: input description: a YAML file or a mapping; `fields` and `input` (of the command line) win over it.
        gpus: processes on this machine, one GPU each; None: as released 4, at most as many as there are GPUs. On a CPU
            the number of processes, None: one. Never more than units of work.
        shard: (number, count): this run makes only every count-th unit, from `number` on (job arrays).
        image_transform: YAML of the pictures' transform; None: squashed bilinearly to the tokenizer's size (of a
            system's tokenizer: the system's own).
        batch_size: pictures encoded at once, fewer where they do not fit into memory; None: as released 256, on a CPU
            32.
        workers: decode processes for each encoding process; 0: none.
        views: of each picture (kinds caption, qa and chat); all but the first are augmented, from `seed`.
        block: records of a unit where the input is no tar; limit: records per output tar.
        resume: continue in a folder that exists; else it is refused.
        max_bad: this many broken samples in a row end the run.
    """

    kind: str
    data: str | Mapping[str, Any]
    save_dir: str
    encoder: EncoderSettings
    fields: str | dict[str, str] | None = None
    input: Mapping[str, Any] | None = None
    gpus: int | None = setting(None, least=1)
    shard: tuple[int, int] = (0, 1)
    image_transform: str | None = None
    batch_size: int | None = setting(None, least=1)
    workers: int = setting(4, least=0)
    views: int = setting(1, least=1)
    seed: int = 0
    block: int = setting(10_000, least=1)
    limit: int = setting(10_000, least=1)
    resume: bool = True
    max_bad: int = setting(20, least=1)
    log_every: float = 10.0
    debug: bool = False


@dataclass(frozen=True)
class Rank:
    """One process of a run (of one shard of a job array): number `rank` of `world`; `device` of this machine."""

    rank: int
    world: int
    device: str

    @property
    def name(self) -> str:
        """Prefix of its log lines, when there are several processes."""
        return f"[{self.rank} of {self.world}] " if self.world > 1 else ""

    def share(self, units: Sequence[Unit], shard: tuple[int, int]) -> list[Unit]:
        """Its units: of the job array's share, every `world`-th one."""
        number, count = shard
        return list(units[number::count][self.rank::self.world])


def run(settings: RunSettings) -> int:
    """Make this run's share; returns the exit code (0: complete; 1: nothing could be used).

    Raises:
        ConfigError, DataError: refusals before the work and, in a single process, during it.
    """
    kind = get_kind(settings.kind)
    source = read_input_settings(settings.data, kind.name, fields=settings.fields, **dict(settings.input or {}))
    kind.keys(source.fields)
    _check(settings)
    units = list_units(source, settings.block)
    ranks = _ranks(settings, len(units[settings.shard[0]::settings.shard[1]]))
    save_dir = Path(settings.save_dir)
    with writing(save_dir, DataError):
        _refuse_existing(settings, units, ranks)
    refuse_other_settings(save_dir, _of_folder(settings, source))
    share = f", of which share {settings.shard[0]} of {settings.shard[1]}" if settings.shard[1] > 1 else ""
    log_line(f"{counted(len(units), 'unit')} of {source.files or source.format} as {kind.name} records to "
             f"{save_dir}{share}; {len(ranks)} of {ranks[0].world} process{'es' * (ranks[0].world > 1)} started here.")
    if len(ranks) == 1:
        work(settings, source, units, ranks[0])
        code = DONE
    else:
        code = _spawn(settings, source, units, ranks)
    manifest = merge(save_dir, units)
    if manifest is not None:
        log_line(summary(manifest, save_dir))
        if not manifest["samples"] and (manifest["read"] or manifest["bad"]):
            log_line(f"{save_dir}: not one record was written. Delete this folder before the next run, which would "
                     "take its parts as finished.")
            return code or SOME_FAILED
    elif code == DONE:
        log_line(f"{save_dir}: this share is finished; others still work or have to be run.")
    return code


def work(settings: RunSettings, source: InputSettings, units: Sequence[Unit], rank: Rank) -> None:
    """Encode the unfinished units of one process's share."""
    save_dir = Path(settings.save_dir)
    log = log_line if rank.world == 1 else lambda line: log_line(rank.name + line)
    encoder = Encoder(replace(settings.encoder, device=rank.device), log)
    batch_size = settings.batch_size or (CPU_BATCH if encoder.device.type == "cpu" else RELEASED_BATCH)
    transform = read_transform(settings.image_transform, encoder.transform, encoder.image_size)
    kind, vocabulary = get_kind(settings.kind), encoder.vocabulary
    decoder = TaskDecoder(kind, source, transform, views=settings.views, seed=settings.seed)
    agree_on_settings(save_dir, {
        **_of_folder(settings, source), "tokenizer": encoder.fingerprint, "codes": vocabulary.n_codes,
        "tokens_per_image": vocabulary.tokens_per_image, "transform": asdict(transform)})
    own, left = rank.share(units, settings.shard), list[Unit]()
    for unit in own:
        manifest, reason = check_part(save_dir, unit)
        if manifest is None:
            left.append(unit)
        if reason:
            log_line(f"{rank.name}{reason}; it is made again.")
    if len(left) < len(own):
        log_line(f"{rank.name}{len(own) - len(left):,} of {len(own):,} units were finished and match their manifests.")
    made = {"device": encoder.device.type, "dtype": encoder.dtype,
            "compiled": encoder.compiled, "batch_size": batch_size, **versions()}
    weight_unit = "byte" if any(unit.format == "tar" for unit in left) else "record"
    with Progress("extraction", sum(unit.weight for unit in left), weight_unit, every=settings.log_every,
                  log=log) as progress:
        extractor = Extractor(encoder, decoder, left, save_dir, batch_size=batch_size, limit=settings.limit,
                              workers=settings.workers, max_bad=settings.max_bad, made=made, progress=progress)
        extractor.run()
    log_line(f"{rank.name}{extractor.summary()}")


def _of_folder(settings: RunSettings, source: InputSettings) -> dict[str, Any]:
    """The settings of an output folder that are known before the tokenizer is loaded."""
    kind = get_kind(settings.kind)
    return {"format": 1, "kind": kind.name, "views": settings.views if kind.views else 1, "seed": settings.seed,
            "input": {**source.identity(), "fields": kind.keys(source.fields)}, "block": settings.block,
            "limit": settings.limit}


# ---- processes


def _ranks(settings: RunSettings, units: int) -> list[Rank]:
    """The processes to run here, each with at least one unit."""
    cuda = settings.encoder.device != "cpu" and torch.cuda.is_available()
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():  # torchrun starts the processes
        world = int(os.environ["WORLD_SIZE"])
        device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else settings.encoder.device
        return [Rank(int(os.environ["RANK"]), world, device)]
    if not cuda or settings.encoder.device.startswith("cuda:"):
        here = settings.gpus or 1
        devices = [settings.encoder.device] * min(here, max(units, 1))
    else:
        there = torch.cuda.device_count()
        here = settings.gpus or min(RELEASED_GPUS, there)
        if here > there:
            raise ConfigError(f"--gpus {here}: this machine has {there} GPU{'s' * (there != 1)}.")
        devices = [f"cuda:{gpu}" for gpu in range(min(here, max(units, 1)))]
    return [Rank(rank, len(devices), device) for rank, device in enumerate(devices)]


def _spawn(settings: RunSettings, source: InputSettings, units: Sequence[Unit], ranks: Sequence[Rank]) -> int:
    """One process per rank; each reports its own errors. Returns the common exit code."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
    children = [context.Process(target=_child, args=(settings, source, units, rank, len(ranks)),
                                name=f"process {rank.rank}") for rank in ranks]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join()
    except KeyboardInterrupt:
        for child in children:
            child.terminate()
        raise
    failed = [child for child in children if child.exitcode != 0]
    if not failed:
        return DONE
    codes = [(child.name, child.exitcode or 0) for child in failed]
    reasons = ", ".join(f"{name} was killed by signal {-code}" if code < 0 else f"{name} ended with code {code}"
                        for name, code in codes)
    log_line(f"{len(failed)} of {len(children)} processes failed ({reasons}); the same command makes the rest.")
    return REFUSED if all(child.exitcode == REFUSED for child in failed) else SOME_FAILED


def _child(settings: RunSettings, source: InputSettings, units: Sequence[Unit], rank: Rank, here: int) -> None:
    end_with_parent()
    if rank.device in ("cpu", "auto") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))

    def job() -> int:
        work(settings, source, units, rank)
        return DONE

    sys.exit(guarded(f"process {rank.rank}", settings.debug, job))


# ---- refusals


def _check(settings: RunSettings) -> None:
    check_settings(settings, "extraction")
    number, count = settings.shard
    if not 0 <= number < count:
        raise ConfigError(f"--shard {number}/{count}: must be I/N with I from 0 to N-1.")
    if settings.views > 1 and not get_kind(settings.kind).views:
        raise ConfigError(f"--views: {settings.kind} records hold one view of each picture; only caption, qa "
                          "and chat records hold several.")


def _refuse_existing(settings: RunSettings, units: Sequence[Unit], ranks: Sequence[Rank]) -> None:
    """Parts of inputs that are no longer there; and without resume anything at all, or, where other processes write
    too, this run's own parts."""
    save_dir = Path(settings.save_dir)
    beyond = sorted(folder.name for folder in save_dir.glob("part-*")
                    if folder.name[5:].isdigit() and int(folder.name[5:]) >= len(units))
    if beyond:
        raise DataError(f"{save_dir}: holds {beyond[0]}, but there are only {len(units)} units; {CHANGED}")
    if settings.resume:
        return
    if len(ranks) == ranks[0].world and settings.shard[1] == 1:
        taken = save_dir.is_dir() and any(save_dir.iterdir())
    else:
        own = [unit for rank in ranks for unit in rank.share(units, settings.shard)]
        taken = any(part_folder(save_dir, unit).exists() for unit in own)
    if taken:
        raise DataError(f"{save_dir}: holds an earlier run's output; continue it with --resume, or choose another "
                        "--save_dir.")
