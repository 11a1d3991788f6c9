"""Measure a system on nano's scenes and write its report.

    python -m seed_nano.report --model pretrained/nano --out outputs/report --limit 250

The first `--limit` scenes of each list are captioned, asked about, drawn and edited, twice as many
reconstructed; 500 is the full report.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from seed_multimodal.cli.common import add_flags, load_system, program_parser
from seed_multimodal.disk import writable_folder
from seed_multimodal.entry import (
    DONE,
    add_device,
    bounded_int,
    log_line,
    run_program,
)
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation import machine
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_keys
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.scoring import Section
from seed_nano.report.sections import Run, sections_of
from seed_nano.report.systems import System
from seed_nano.report.write import aims, write_card, write_report
from seed_nano.world.splits import HELD_OUT_SPLITS


def report(options: argparse.Namespace) -> int:
    """The command."""
    # 1. Check the options before anything is loaded.
    splits = list(dict.fromkeys(map(str.strip, options.splits.split(","))))
    check_keys(splits, HELD_OUT_SPLITS, "Split")
    start = time.monotonic()
    sizes = Sizes.limited(options.limit)
    kind = SystemConfig.find(options.model).system
    writable_folder(options.out, ConfigError)
    # 2. Load the judge and the system.
    judge = Judge.from_pretrained(find_judge(options.model, options.judge))
    system = System(load_system(options), options.batch, options.seed)
    device = system.codec.device
    judge.to(device)
    # 3. Measure every section of every split.
    runs: list[Run] = []
    figures: dict[str, Section] = {}
    total = sum(len(sections_of(kind, split)) for split in splits)
    with Progress("report", total, "section", every=0, log=log_line) as progress:
        for split in splits:
            runs.append(Run(system, judge, make_samples(split, sizes)))
            figures[split] = {}
            for section in sections_of(kind, split):
                figures[split][section.__name__] = section(runs[-1])
                progress.update(1, **{split: section.__name__})
    # 4. Write the report and, after a training, the model card.
    write_report(
        {
            "model": str(options.model),
            **machine.circumstances(device),
            "seconds": round(time.monotonic() - start, 1),
            "system": system.facts(),
            "settings": {**asdict(sizes), "seed": options.seed, "batch": options.batch},
            "judge": judge.config.training,
            "aims": aims(kind, figures),
            "splits": figures,
        },
        runs,
        options.out,
    )
    if options.work:
        write_card(Path(options.model), options.work, options.out)
    print(f"Wrote {options.out / 'report.md'}, report.json, answers.json.gz and sheets.")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.report", __doc__ or "")
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument(
        "--judge", help="folder of the judge (default: MODEL/judge, or the shipped one)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/report"), help="output folder (%(default)s)"
    )
    parser.add_argument("--splits", default=",".join(HELD_OUT_SPLITS))
    parser.add_argument(
        "--limit",
        type=bounded_int(1),
        default=Sizes.scenes,
        help="scenes of a split (%(default)s, the full report; all else in proportion)",
    )
    parser.add_argument("--batch", type=bounded_int(1), default=64)
    parser.add_argument("--seed", type=bounded_int(0), default=0, help="seed of the images' noise")
    parser.add_argument(
        "--work",
        type=Path,
        help="a training's work folder: also write MODEL/README.md, with its records",
    )
    add_device(parser)
    add_flags(parser, "language model")
    return run_program(parser, report, arguments, "report")


if __name__ == "__main__":
    raise SystemExit(main())
