"""The report card of a system on nano's world: every section per split, with intervals, ceilings, pictures and plots.

    python -m seed_nano.report.report --model pretrained/nano --out pretrained/nano/report

Writes report.json (everything), answers.json.gz (every answer), report.md (tables), contact sheets and plots. The first
`--limit` scenes of each list are described, asked about and drawn, and as many edits made; 500 is the full report, with
1,000 pictures rebuilt. `seed eval tokenizer` measures what needs no language model.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seed_multimodal.disk import read_json_object, replace_text, replacing, writable_folder, writing
from seed_multimodal.entry import DONE, add_device, add_quantization, run_program
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.evaluation import machine
from seed_multimodal.evaluation.metrics import plain
from seed_multimodal.hub import locate_system
from seed_multimodal.progress import Progress
from seed_multimodal.settings import nearest
from seed_multimodal.systems.open_system import kind_of
from seed_multimodal.training.plots import figure_kind
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.lavit_run import LavitRun
from seed_nano.report.report_plots import PLOTS, save_plots
from seed_nano.report.report_sheets import SHEETS, save_sheets
from seed_nano.report.report_text import AIMS, LAVIT_AIMS, X_AIMS, aims, markdown
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sizes import OPENERS
from seed_nano.report.split_run import SplitRun
from seed_nano.report.tasks import System
from seed_nano.report.x_run import XRun
from seed_nano.world.evaluation import HELD_OUT_SPLITS

MODULE = "seed_nano.report.report"
Log = Callable[[str], None]
KINDS: dict[str, tuple[type[SplitRun], Sequence[Any]]] = {
    "seed_llama": (SplitRun, AIMS), "seed_x": (XRun, X_AIMS), "lavit": (LavitRun, LAVIT_AIMS)}
"""kind of a system -> what measures it, its aims"""


def evaluate(system: System, judge: Judge, splits: Sequence[str], sizes: Sizes, log: Log = print,
             kind: type[SplitRun] = SplitRun) -> list[SplitRun]:
    """All sections of all splits."""
    runs = [kind(system, judge, make_samples(split, sizes)) for split in splits]
    with Progress("report", sum(len(run.parts()) for run in runs), "part", every=0, log=log) as progress:
        for run in runs:
            def tell(part: str, split: str = run.samples.split) -> None:
                progress.update(1, **{split: part})

            run.measure(tell)
    return runs


def read_splits(text: str) -> list[str]:
    """The splits that a list with commas names, each once.

    Raises:
        ConfigError: one is none.
    """
    splits = list(dict.fromkeys(map(str.strip, text.split(","))))
    for split in splits:
        if split not in HELD_OUT_SPLITS:
            raise ConfigError(f"There is no split {split!r}{nearest(split, HELD_OUT_SPLITS)}: use "
                              f"{', '.join(HELD_OUT_SPLITS)}.")
    return splits


def write_report(report: dict[str, Any], runs: Sequence[SplitRun], out: Path) -> None:
    """Write report.json and answers.json.gz, then sheets and plots, then report.md, which shows them, into `out`; those
    sheets and plots of an earlier report that this one has not are removed.

    Raises:
        ConfigError: a file cannot be written; what was written before it stays.
    """
    with writing(out, ConfigError):
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "report.json", json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n")
        answers = {run.samples.split: run.answers for run in runs}
        packed = gzip.compress((json.dumps(answers, ensure_ascii=False) + "\n").encode(), mtime=0)  # a tenth
        with replacing(out / "answers.json.gz") as file:
            file.write(packed)
        sheets = [*save_plots(runs, out), *save_sheets(runs, out)]
        for left in {*PLOTS, *(f"{kind}.webp" for kind in SHEETS)}.difference(sheets):  # an earlier report's
            (out / left).unlink(missing_ok=True)
        replace_text(out / "report.md", markdown(plain(report), sheets))


def report_folder(model: str | Path, given: str | Path | None = None) -> Path:
    """The folder that is meant: `given`, or `report` in the system's own, or in outputs if its parts lie apart."""
    if given is not None:
        return Path(given)
    home = locate_system(model)
    return (home if home is not None and home.is_dir() else Path("outputs")) / "report"


def check_place(out: Path, given: bool, splits: Sequence[str], scenes: int) -> None:
    """Refuse what the end of a report would fail for, or regret: now, since a report takes minutes.

    Raises:
        ConfigError: no matplotlib; no folder that can be written; none was named (`given`), and there lies a report of
            more scenes or other splits, such as the shipped one.
    """
    figure_kind()
    writable_folder(out, ConfigError)
    there: dict[str, Any] = {}
    if not given and (out / "report.json").is_file():
        with contextlib.suppress(ConfigError):  # a damaged one is no loss
            there = read_json_object(out / "report.json", ConfigError)
    more, missing = there.get("settings", {}).get("scenes", 0), [s for s in there.get("splits", {}) if s not in splits]
    if more > scenes or missing:
        raise ConfigError(f"{out} holds a report of {counted(more, 'scene')} a split, of {', '.join(there['splits'])}; "
                          "this one would be of less: name another folder with --out.")


def build_report(options: argparse.Namespace, log: Log) -> Path:
    """Load everything, measure, write; returns the folder."""
    for name, least in (("limit", 1), ("batch", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    start, splits, sizes = time.monotonic(), read_splits(options.splits), Sizes.limited(options.limit)
    judge_folder = find_judge(options.model, options.judge)
    out = report_folder(options.model, options.out)
    check_place(out, options.out is not None, splits, sizes.scenes)
    which = kind_of(options.model)
    kind, wanted = KINDS[which]
    system: Any = OPENERS[which].from_pretrained(
        options.model, device=options.device, dtype=options.dtype, quantization=options.quantization,
        batch=options.batch, seed=options.seed, log=log)
    judge = Judge.from_pretrained(judge_folder, device=system.device)
    log(f"Loaded in {time.monotonic() - start:.0f} s; measuring {', '.join(splits)} by {judge_folder}.")
    runs = evaluate(system, judge, splits, sizes, log, kind)
    sections = {run.samples.split: run.sections for run in runs}
    report: dict[str, Any] = {
        "model": str(options.model), **machine.circumstances(system.device, machine.command_line(MODULE)),
        "seconds": round(time.monotonic() - start, 1), "system": system.facts(),
        "settings": {**asdict(sizes), "seed": options.seed, "batch": options.batch}, "judge": judge.config.training,
        "aims": aims(sections, wanted), "splits": sections}
    write_report(report, runs, out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Measure a system and write its report "
                                     "card.")
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument("--judge", default=None, help="the judge's folder (default: MODEL/judge, or the shipped one)")
    parser.add_argument("--out", default=None, help="folder to write into (default: report in the system's folder, "
                        "in outputs for parts that lie apart, unless a larger report lies there)")
    parser.add_argument("--splits", default=",".join(HELD_OUT_SPLITS))
    parser.add_argument("--limit", type=int, default=Sizes.scenes, help="scenes a split (default: %(default)s, the "
                        "full report; all else in proportion)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the noise that pictures are drawn from")
    add_device(parser)
    add_quantization(parser)

    def work(options: argparse.Namespace) -> int:
        out = build_report(options, lambda line: print(line, flush=True))
        print(f"Wrote {out / 'report.md'}, report.json, answers.json.gz, plots and contact sheets.")
        return DONE

    return run_program(parser, work, arguments, "report")


if __name__ == "__main__":
    raise SystemExit(main())
