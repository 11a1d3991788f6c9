"""`seed eval` for every system, and the programs of `MultiModalLLM/eval/`, alone or under torchrun:
the flags are the settings of `evaluation`.

Without flags two of the programs repeat the original's probes; a run resumes.
"""

from __future__ import annotations

import os
import pkgutil
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.cli.common import (
    add_common,
    add_settings,
    cat_image,
    chosen_settings,
    load_system,
    loading,
    print_json,
    program_parser,
    set_flags,
)
from seed_multimodal.entry import (
    DONE,
    SOME_FAILED,
    add_debug,
    add_device,
    log_line,
    rank_and_world_size,
    run_program,
)
from seed_multimodal.errors import ConfigError, pluralize
from seed_multimodal.evaluation.benchmark import (
    BENCHMARKS,
    AnyBenchmark,
    benchmark_class,
    open_benchmark,
    run,
)
from seed_multimodal.evaluation.suite import SuiteSettings, run_suite, suite_table
from seed_multimodal.evaluation.text2image import BUILT_IN, OriginalDrawings
from seed_multimodal.evaluation.tokenizer_settings import (
    MeasuredImages,
    PrefixSettings,
    TokenizerSettings,
)
from seed_multimodal.evaluation.vqa import PLAIN_QUESTION, PROBE, Questions
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.plugins import registered
from seed_multimodal.settings import read_settings

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands, Options
    from seed_multimodal.pipelines.base import MultimodalSystem

# Imported when they are used: they need torch.
EVALUATE_TOKENIZER = "seed_multimodal.evaluation.tokenizer:evaluate_tokenizer"
EVALUATE_PREFIXES = "seed_multimodal.evaluation.prefix:evaluate_prefixes"
# The program → its benchmark.
PROGRAMS = {"eval_vqa.py": "vqa", "eval_caption.py": "caption"}
# Flags of the system that is measured.
_add_system = partial(add_common, seed=42, batch_size=16, language=True)


def eval_program(program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """A program of `MultiModalLLM/eval/` by its name; returns the exit code."""
    parser = program_parser(program, description)
    if program in PROGRAMS:
        _add_benchmark(parser, PROGRAMS[program], f"outputs/{Path(program).stem}", "8b")
        return run_program(parser, evaluate, argv)
    # Drawings without scores, with the prompts of the pretrained model.
    add_settings(parser, OriginalDrawings)
    _add_system(parser, "8b", out="generated_images", generation=True, drawing=True)
    parser.set_defaults(
        benchmark="text2image", file=BUILT_IN, original=True, best_of=1, prompts="plain"
    )
    return run_program(parser, evaluate, argv)


def add_commands(kinds: Commands) -> None:
    """The commands below `seed eval`."""
    # A tokenizer, and the suite of all benchmarks.
    tokenizer = kinds.add_parser("tokenizer", help="retrieval, reconstruction, codebook")
    tokenizer.set_defaults(work=partial(measure, TokenizerSettings, EVALUATE_TOKENIZER))
    prefix = kinds.add_parser("prefix", help="what the first codes of an image hold")
    prefix.set_defaults(work=partial(measure, PrefixSettings, EVALUATE_PREFIXES))
    for parser, kind in ((tokenizer, TokenizerSettings), (prefix, PrefixSettings)):
        add_settings(parser, kind)
        add_device(parser)
    suite = kinds.add_parser("suite", help="the papers' tables, next to published figures")
    add_settings(suite, SuiteSettings)
    _add_system(suite, "nano", out="outputs/suite", drawing=True)
    suite.set_defaults(work=run_tables)

    # Each benchmark; one of another package that is broken leaves the others usable.
    for command in (*BENCHMARKS, *registered("benchmarks")):
        if command in kinds.choices:
            log_line(f"Benchmark {command} of another package is left out: the name is taken.")
            continue
        try:
            title = benchmark_class(command).title
            parser = kinds.add_parser(command, help=title, description=title)
            _add_benchmark(parser, command, f"outputs/eval_{command}", "nano")
        except (ConfigError, ArgumentError) as error:  # a flag of ours is an ArgumentError
            log_line(f"Benchmark {command} is left out: {error}")
            kinds.choices.pop(command, None)
    for parser in kinds.choices.values():
        add_debug(parser)


def _add_benchmark(parser: ArgumentParser, command: str, out: str, model: str) -> None:
    """Flags of a benchmark and of the system."""
    kind = benchmark_class(command)
    add_settings(parser, kind)
    _add_system(parser, model, out=out, generation=True, drawing=kind.draws)
    parser.set_defaults(work=evaluate, benchmark=command)


# ---- work


def evaluate(args: Namespace) -> int:
    """A benchmark with the settings of the flags; returns the exit code."""
    # Of several processes each has a GPU.
    if "LOCAL_RANK" in os.environ and args.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.benchmark == "vqa" and args.file is None:
        return _ask_once(args)
    kind = benchmark_class(args.benchmark)
    values = {**set_flags(args, kind), "options": _options(args)}
    benchmark = open_benchmark(args.benchmark, **values)
    if values.get("image_folder") is not None:
        return run_benchmark(benchmark, lambda: None)
    if not benchmark.draws:
        SystemConfig.find(args.model).check_ability("writes")
    return run_benchmark(benchmark, partial(_load, args))


def run_benchmark(benchmark: AnyBenchmark, load: Callable[[], MultimodalSystem | None]) -> int:
    """Evaluate a system and print the summary; returns the exit code. Arguments: see `run`."""
    summary = run(benchmark, load)
    if summary is None:  # other processes still work
        return DONE
    # Unusable samples are no error, but the exit code tells.
    print_json(summary)
    if not summary["bad"]:
        return DONE
    log_line(
        f"{benchmark.out}: {pluralize(summary['bad'], 'sample')} of "
        f"{summary['samples']:,} could not be used; the same command tries them again."
    )
    return SOME_FAILED


def _ask_once(args: Namespace) -> int:
    """One question, with the original's prompt and settings; the answer goes to stdout."""
    if args.images is not None:
        raise ConfigError(
            f"{args.images}: --images is the folder of the images that --questions names; ask "
            f"about one image with --image."
        )
    # The flags override the settings of the original's probe.
    system = _load(args)
    system.use_plain_prompts()
    question = args.question or Questions.question
    answer = system.ask(
        args.image or cat_image(),
        PLAIN_QUESTION.format(question),
        short=False,
        **{**PROBE, "seed": args.seed, **_options(args)},
    )
    print(answer.partition("\n")[0].strip())  # models continue with a question of their own
    return DONE


def _options(args: Namespace) -> Options:
    """Settings of generation and drawing; a temperature or `top_p` switches sampling on."""
    options = chosen_settings(args)
    if "temperature" in options or "top_p" in options:
        options = {"do_sample": True, **options}
    return options


def _load(args: Namespace) -> MultimodalSystem:
    """The system; it draws if the program has the flags of drawing."""
    system = load_system(args, load_decoder=hasattr(args, "num_inference_steps"))
    if getattr(args, "keep_ratio", False):
        codec: Any = system.images  # SEED's
        codec.transform = replace(codec.transform, keep_ratio=True)
    return system


def measure(kind: type[MeasuredImages], function: str, args: Namespace) -> int:
    """`seed eval tokenizer` or `prefix`: `function` measures and writes its files; logs the figures
    of its report and prints it as a JSON line."""
    settings = read_settings(kind, set_flags(args, kind), "seed eval")
    with loading(args):
        report = pkgutil.resolve_name(function)(settings, log_line)
    for line in _figures(report):
        log_line(line)
    print_json(report)
    return DONE


def _figures(section: Mapping[str, Any], label: str = "") -> Iterator[str]:
    """A line for each mean in a report, with its interval."""
    for key, value in section.items():
        if not isinstance(value, Mapping):
            continue
        if value.get("value") is not None:
            yield f"{label}{key}: {value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
        yield from _figures(value, f"{label}{key} ")


def run_tables(args: Namespace) -> int:
    """`seed eval suite`: every benchmark whose files are there; prints and writes the table."""
    if rank_and_world_size()[1] > 1:
        raise ConfigError("seed eval suite runs in one process; the single commands share work.")
    values = {**set_flags(args, SuiteSettings), "options": chosen_settings(args)}
    entries = run_suite(read_settings(SuiteSettings, values, "suite"), partial(_load, args))
    print(suite_table(entries), end="")
    return SOME_FAILED if any(entry["bad"] for entry in entries) else DONE
