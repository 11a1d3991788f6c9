"""The report card of a system: every section per split, with sample sizes, intervals, chance, ceilings and pictures.

    python -m seed_multimodal.evaluation.report --model pretrained/nano --data data/nano64 --out pretrained/nano/report

Writes report.json (everything), report.md (tables) and contact sheets. All pictures of a split are tokenised and make
the gallery; `--limit` of them (drawn by `--seed`) are rebuilt, drawn, described, asked about and edited.
`seed eval tokenizer` measures what needs no language model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.disk import disk_reason, replace_text
from seed_multimodal.entry import DONE, add_device, add_quantization, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation import machine
from seed_multimodal.evaluation.batched import BatchedSystem
from seed_multimodal.evaluation.judge import Judge
from seed_multimodal.evaluation.metrics import codebook_statistics, plain
from seed_multimodal.evaluation.report_sheets import SheetPictures, save_sheets
from seed_multimodal.evaluation.report_text import aims, markdown
from seed_multimodal.evaluation.tasks import (
    Section,
    System,
    World,
    chance,
    describe_section,
    edit_section,
    qa_section,
    score_pictures,
)
from seed_multimodal.evaluation.tokenizer_open import find_judge
from seed_multimodal.progress import Progress

SPLITS = ("val", "test_combo", "test_concept")
MODULE = "seed_multimodal.evaluation.report"
Log = Callable[[str], None]


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a report; `limit` pictures a split are rebuilt, drawn, described and edited."""

    splits: tuple[str, ...] = SPLITS
    limit: int = 128
    questions: int = 400
    seed: int = 0


def sample(rows: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """At most `limit` of `rows`, chosen by `seed`, in their order."""
    if len(rows) <= limit:
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return [rows[i] for i in sorted(chosen.tolist())]


def evaluate(
    system: System, world: World, settings: ReportSettings, log: Log = print
) -> tuple[Section, list[SheetPictures], Section]:
    """All sections of all splits.

    Returns:
        (split → sections), pictures for the contact sheets, and the raw answers (split → lists) for reading.
    """
    splits, shown, answers = {}, [], {}
    with Progress("report", 5 * len(settings.splits), "part", every=0, log=log) as progress:
        for split in settings.splits:
            splits[split], pictures, answers[split] = _evaluate_split(system, world, split, settings, progress)
            shown.append(pictures)
    return splits, shown, answers


def _evaluate_split(system: System, world: World, split: str, settings: ReportSettings,
                    progress: Progress) -> tuple[Section, SheetPictures, Section]:
    rows, nano = _rows(world, split), world.nano
    targets = sample(rows, settings.limit, settings.seed)
    all_codes = system.codes(nano.images()[rows])
    where = {row: i for i, row in enumerate(rows)}
    codes = [all_codes[where[t]].tolist() for t in targets]
    section: Section = {"pictures": len(rows), "codes": codebook_statistics(all_codes, system.codebook_size),
                        "chance": chance(world, targets, rows)}
    rebuilt = system.pictures(codes)
    section["reconstruction"] = score_pictures(world, rebuilt, targets, rows, by_name=False)
    section["ceilings"] = _ceilings(system, world, targets, rows)
    progress.update(1, **{split: f"rebuilt {len(targets)} pictures"})
    drawn = _paint(system, system.draw([world.names[t] for t in targets]))
    section["drawing"] = score_pictures(world, drawn, targets, rows, by_name=True)
    progress.update(1, **{split: f"drew {len(targets)} pictures"})
    section["caption"], texts = describe_section(world, system, codes, targets)
    progress.update(1, **{split: f"described {len(targets)} pictures"})
    rng = np.random.default_rng(settings.seed)
    section["qa"], asked = qa_section(world, system, codes, targets, settings.questions, rng)
    progress.update(1, **{split: f"answered {len(asked)} questions"})
    edits = sample([e for e in nano.edits if e.split == split], settings.limit, settings.seed)
    edited = _edit(system, world, edits)
    section["edit"] = edit_section(world, edited, edits, rows)
    progress.update(1, **{split: f"edited {len(edits)} pictures"})
    said = {"captions": [{"key": nano.records[t].key, "text": text, "label": nano.records[t].label}
                         for t, text in zip(targets, texts, strict=True)], "questions": asked}
    return section, SheetPictures(split, targets, rebuilt, drawn, texts, edits, edited), said


def _rows(world: World, split: str) -> list[int]:
    rows = world.nano.split(split)
    if not rows:
        raise ConfigError(f"The data set has no pictures in split {split!r}.")
    return rows


def _paint(system: System, codes: Sequence[list[int] | None]) -> list[Image.Image | None]:
    """Pictures of the rows that have codes, None for the others."""
    pictures = iter(system.pictures([row for row in codes if row is not None]))
    return [None if row is None else next(pictures) for row in codes]


def _edit(system: System, world: World, edits: Sequence[Any]) -> list[Image.Image | None]:
    if not edits:
        return []
    sources = [world.nano.index[e.source] for e in edits]
    codes = system.codes(world.nano.images()[sources])
    return _paint(system, system.edit(codes.tolist(), [e.instruction for e in edits]))


def _ceilings(system: System, world: World, targets: Sequence[int], rows: Sequence[int]) -> Section:
    """Ceilings: the judge's scores of the real pictures, and of the decoder's VAE alone where there is one."""
    real = [Image.fromarray(p) for p in world.nano.images()[list(targets)]]
    found: Section = {"real": score_pictures(world, real, targets, rows, by_name=True)}
    round_trip = getattr(system, "round_trip", None)
    rebuilt = round_trip(world.nano.images()[list(targets)]) if round_trip else None
    if rebuilt is not None:
        found["vae"] = score_pictures(world, rebuilt, targets, rows, by_name=False)
    return found


def write_report(report: dict[str, Any], shown: Sequence[SheetPictures], answers: Section, world: World,
                 out: Path) -> None:
    """Write report.json, answers.json, report.md and the sheets into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    report["sheets"] = save_sheets(shown, world, out)
    replace_text(out / "report.json", json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n")
    replace_text(out / "answers.json", json.dumps(answers, indent=0, ensure_ascii=False) + "\n")
    replace_text(out / "report.md", markdown(plain(report)))


def build_report(options: argparse.Namespace, log: Log) -> Path:
    """Load everything, measure, write; returns the folder."""
    settings = ReportSettings(tuple(options.splits.split(",")), options.limit, options.questions, options.seed)
    for name, least in (("limit", 1), ("questions", 1), ("batch", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    from seed_multimodal.data.nano import load_nano

    start = time.monotonic()
    judge_folder = find_judge(options.model, options.judge)
    out = Path(options.out)
    try:  # now: a report takes minutes
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: no folder that can be written ({disk_reason(error)}).") from error
    system = BatchedSystem.from_pretrained(options.model, device=options.device, dtype=options.dtype,
                                           quantization=options.quantization, batch=options.batch, seed=settings.seed,
                                           log=log)
    judge = Judge.from_pretrained(judge_folder, device=system.device)
    world = World(load_nano(options.data), judge)
    log(f"Loaded in {time.monotonic() - start:.0f} s; measuring {', '.join(settings.splits)} by {judge_folder}.")
    splits, shown, answers = evaluate(system, world, settings, log)
    report: dict[str, Any] = {
        "model": str(options.model), "data": str(options.data or "data/nano64"),
        **machine.circumstances(system.device, machine.command_line(MODULE)),
        "seconds": round(time.monotonic() - start, 1), "system": system.facts(),
        "settings": asdict(settings), "judge": judge.config.training, "aims": aims(splits), "splits": splits}
    write_report(report, shown, answers, world, out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure a system and write its report card.")
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument("--data", default=None, help="folder of the nano data set (default: the committed one)")
    parser.add_argument("--judge", default=None, help="the scorer's folder (default: MODEL/judge, or the shipped one)")
    parser.add_argument("--out", default="pretrained/nano/report", help="folder to write into")
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--limit", type=int, default=ReportSettings.limit,
                        help="pictures a split that are made or described")
    parser.add_argument("--questions", type=int, default=ReportSettings.questions, help="questions a split")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    add_quantization(parser)

    def work(options: argparse.Namespace) -> int:
        out = build_report(options, lambda line: print(line, flush=True))
        print(f"Wrote {out / 'report.md'}, report.json and the contact sheets.")
        return DONE

    return run_program(parser, work, arguments, "report")


if __name__ == "__main__":
    raise SystemExit(main())
