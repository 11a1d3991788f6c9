"""`seed data check | convert`, and the extraction tools: training data checked, converted,
pre-tokenised."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from seed_multimodal.cli.common import add_command, add_flags, emit, program_parser, set_flags
from seed_multimodal.entry import DONE, SOME_FAILED, add_device, log_line, run_program
from seed_multimodal.errors import ConfigError, pluralize
from seed_multimodal.weights.catalogue import SHIPPED_TOKENIZERS


def check(args: Namespace) -> int:
    """Read a run's sources, or files, as training does; prints a report. Exit code 1 if a record is
    broken."""
    from seed_multimodal.data.check import check_sources, read_run, report_lines
    from seed_multimodal.data.stream.config import read_data_settings

    # 1. The data of a run, or files as one source.
    if len(args.files) == 1 and args.files[0].endswith((".yaml", ".yml")):
        settings, tokenizer = read_run(args.files[0], args.tokenizer)
    elif args.decoder is None or args.tokenizer is None:
        raise ConfigError(
            "Files need --decoder NAME (images with captions: lavit.caption, seed_x.caption; "
            f"conversations: chat, seed_x.chat) and --tokenizer DIR ({SHIPPED_TOKENIZERS}); or "
            "name the YAML file of a run."
        )
    else:
        source = {
            "name": args.decoder,
            "files": args.files,
            "decoder": args.decoder,
            "format": args.format,
            "format_options": dict(args.format_option),
            "options": dict(args.option),
            "image_dir": args.images,
        }
        settings = read_data_settings(
            {"sources": [source], "length": args.length}, "seed data check"
        )
        tokenizer = args.tokenizer

    # 2. A report for each source.
    reports = check_sources(settings, tokenizer, args.records)
    n_broken = sum(report["broken"] for report in reports)
    lines = list(chain.from_iterable(map(report_lines, reports)))
    lines.append(pluralize(n_broken, "broken record") if n_broken else "nothing broken")
    record = {"sources": reports, "broken": n_broken}
    emit(args, record, "\n".join(lines))
    return SOME_FAILED if n_broken else DONE


def convert(args: Namespace) -> int:
    """Convert pickled shards to json; prints a summary. Exit code 1 if anything was refused."""
    from seed_multimodal.config import from_compat

    report = from_compat("pickled_shards:convert_shards")(args.tars, args.out, args.workers)
    # What is missing in the result, before the summary.
    for sentence in report.refused:
        log_line(f"seed: {sentence}")
    for sentence in report.skipped:
        log_line(f"seed: left out: {sentence}")
    emit(
        args,
        {
            "out": args.out,
            "converted": report.converted,
            "kept": report.existing,
            "samples": report.samples,
            "refused": report.refused,
            "skipped": report.skipped,
        },
        f"{args.out}: {pluralize(report.converted, 'shard')} converted, {report.existing:,} "
        f"already done, {len(report.refused):,} refused; {pluralize(report.samples, 'sample')}, "
        f"{len(report.skipped):,} left out",
    )
    return SOME_FAILED if report.refused or report.skipped else DONE


def index(args: Namespace) -> int:
    """Write the indexes of shards and JSONL files next to them."""
    from seed_multimodal.data.formats.records import write_indexes

    count = write_indexes(args.files, args.procs)
    emit(args, {"files": count}, f"{pluralize(count, 'file')} indexed")
    return DONE


def add_commands(parser: ArgumentParser) -> None:
    """`check`, `convert` and `index` with their flags."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_command(
        commands, check, "data check", "read a run's data as training does, before training"
    )
    add_command(
        commands, convert, "data convert", "pickled shards of the original → json shards, safely"
    )
    add_command(
        commands, index, "data index", "write the indexes of shards and .jsonl files in advance"
    )


def key_and_value(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value is JSON, or a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# ---- pre-tokenisation


def extraction_script(
    kind: str, program: str, description: str, argv: Sequence[str] | None = None
) -> int:
    """A tool `extract_image_ids_to_torchdata_parallel*.py`, which writes `kind` records; returns
    the exit code."""
    parser = extraction_parser(program, description)
    return run_program(parser, partial(_pretokenize, kind), argv)


def extraction_parser(program: str, description: str) -> ArgumentParser:
    """The flags of every extraction tool; the first eight are the original ones."""
    parser = program_parser(program, description)
    transform = parser.add_mutually_exclusive_group()
    add_flags(transform, "extraction transform")
    add_flags(parser, "extraction")
    add_flags(parser.add_mutually_exclusive_group(), "extraction share")
    add_device(parser, "auto", "auto: float16 on CUDA as the original, else float32")
    parser.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        default=False,
        help="the encoder: minutes before the first image",
    )
    return parser


def _pretokenize(kind: str, args: Namespace) -> int:
    from seed_multimodal.pretokenize.inputs import find_inputs, parse_fields
    from seed_multimodal.pretokenize.run import RunSettings, read_input, run

    args.fields = parse_fields(args.fields)
    settings = RunSettings(kind=kind, **set_flags(args, RunSettings))
    if args.ray:
        from seed_multimodal.pretokenize.ray_cluster import run_on_ray

        return run_on_ray(settings, args.gpus)
    # One process, or one of those that torchrun has started.
    n_processes = 1 if "RANK" in os.environ else _n_processes(args)
    if n_processes == 1:
        return run(settings)

    # This program again under torchrun. An error of the input is shown once, not by each process.
    find_inputs(read_input(settings)[1])
    python_path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable,
        "-m",
        "seed_multimodal.training.torchrun",
        "--standalone",
        f"--nproc_per_node={n_processes}",
        *sys.argv,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path)}
    os.execve(sys.executable, command, environment)


def _n_processes(args: Namespace) -> int:
    """Processes to start on this machine."""
    import torch

    # By default one for each GPU, up to four; on a CPU one.
    n_gpus = torch.cuda.device_count() if args.device in ("auto", "cuda") else 0
    count: int = args.gpus or min(4, n_gpus) or 1
    # Each process has a GPU of its own.
    if args.device.startswith("cuda:") and count > 1:
        raise ConfigError(
            f"--device {args.device} names one GPU, --gpus {count} needs {count}: leave one of "
            "them out."
        )
    if n_gpus and count > n_gpus:
        raise ConfigError(f"--gpus {count}: this machine has {pluralize(n_gpus, 'GPU')}.")
    return count


def index_and_count(text: str) -> tuple[int, int]:
    """I/N: the index and the number of shards."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit():
        raise ArgumentTypeError(f"must be I/N, for example 0/16, not {text!r}")
    return int(index), int(count)
