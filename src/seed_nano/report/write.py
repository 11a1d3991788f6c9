"""Writes a report: report.json, answers.json.gz, sheets, and from templates report.md and the model
card."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import getdoc
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor

from seed_multimodal.disk import (
    JsonObject,
    atomic_open,
    read_json_object,
    replace_text,
    writing,
)
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation import machine
from seed_multimodal.evaluation.metrics import plain
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.images.sheet import Row, contact_sheet
from seed_multimodal.state_dicts import load_state_dict
from seed_nano.report.scoring import Section
from seed_nano.report.sections import AIMS, AT_MOST, TABLE, Run
from seed_nano.world.splits import HELD_OUT_SPLITS

MAX_BYTES = 140_000  # of a sheet
TITLES = {  # of keys; {}: nested key
    "qa": "questions",
    "edit": "edits",
    "n": "samples",
    "first": "first thing",
    "second": "second thing",
    "layout": "layout and number",
    "exact": "exact sentence",
    "r1": "R@1",
    "f1": "F1",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "psnr_things": "PSNR of things, dB",
    "unchanged_psnr": "PSNR of what is unchanged, dB",
    "prefix_bits": "entropy of the first {} code(s), bits",
    "things": "images with {} thing(s):",
    "kinds": "kind {}",
    "blind_kinds": "blind, kind {}",
}
REPORT, CARD = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("report.md", "card.md")
)


def write_report(report: JsonObject, runs: Sequence[Run], out: Path) -> None:
    """Write all files to `out`. Raises ConfigError: a file cannot be written."""
    values = plain(report)
    answers = {run.samples.split: run.answers for run in runs}
    text = json.dumps(answers, ensure_ascii=False) + "\n"
    with writing(out, ConfigError):
        out.mkdir(parents=True, exist_ok=True)
        figures = json.dumps(values, indent=1, ensure_ascii=False)
        replace_text(out / "report.json", f"{figures}\n")
        with atomic_open(out / "answers.json.gz") as file:
            file.write(gzip.compress(text.encode(), mtime=0))
        replace_text(out / "report.md", markdown(values, _save_sheets(runs, out)))


def write_card(model: Path, work: Path, out: Path) -> None:
    """Write the model card `model/README.md`: parts, stage records in the folder `work`, the report
    in `out`."""
    # 1. Records of the stages, in the order in which they finished.
    files = sorted(
        [*work.rglob("*.done.json"), *work.rglob("summary.json")],
        key=lambda file: file.stat().st_mtime,
    )
    stages = [(str(file.relative_to(work)), _listed(read_json_object(file))) for file in files]
    # 2. Parameters and size of each weights file.
    weights = []
    for file in sorted(model.rglob("*.safetensors")):
        n_parameters = sum(map(Tensor.numel, load_state_dict(file).values()))
        megabytes = file.stat().st_size / 1e6
        folder = file.parent.relative_to(model)
        weights.append((f"`{folder}`", f"{n_parameters:,}", f"{megabytes:.2f}"))
    # 3. The report, its headings one level lower and its images linked relative to the card.
    report = re.sub("^#", "##", (out / "report.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    ModelCard(
        CARD.format(
            name=model.resolve().name,
            weights=table(("part", "parameters", "MB"), weights),
            commit=machine.commit(),
            stages=table(("stage", "record"), stages),
            report=report.replace("](", f"]({os.path.relpath(out, model)}/"),
        )
    ).save(model / "README.md")


def aims(kind: str, splits: Mapping[str, Section]) -> list[JsonObject]:
    """The targets of the measured splits, each with value, the judge's ceiling and whether it is
    met."""
    rows: list[JsonObject] = []
    figures = plain(splits)
    for path, wanted in AIMS[kind].items():
        # A path names a section and one of its figures.
        section, _, figure = path.partition(".")
        for split, aim in zip(HELD_OUT_SPLITS, wanted, strict=False):
            numbers = figures.get(split, {}).get(section, {})
            value = _value(numbers.get(figure))
            if value is None:
                continue
            at_most = path in AT_MOST
            rows.append(
                {
                    "what": f"{_label(section)}, {_label(figure)}",
                    "split": split,
                    "aim": aim,
                    "value": value,
                    "ceiling": _value(numbers.get("ceiling")) if figure == "all" else None,
                    "at_most": at_most,
                    "met": value <= aim if at_most else value >= aim,
                }
            )
    return rows


def markdown(report: JsonObject, images: Sequence[str]) -> str:
    """The report (JSON values) as Markdown; `images`: names of the sheets."""
    parts: list[str] = []
    for section, *_ in TABLE:
        # A table for each measured section: a column for each split, a row for each figure.
        name = section.__name__
        above = "{} pixels:" if name == "sizes" else ""
        columns: dict[str, JsonObject] = {}
        for split, figures in report["splits"].items():
            if name in figures:
                columns[split] = dict(_leaves(figures[name], above))
        if columns:
            rows = []
            for label in dict.fromkeys(chain.from_iterable(columns.values())):
                rows.append((label, *(_show(column.get(label)) for column in columns.values())))
            parts += [f"## {_label(name).capitalize()}\n", f"{getdoc(section)}\n"]
            parts.append(table(("", *columns), rows))
    parts += [f"![{name}]({name})\n" for name in images]
    # The template's fields: those of the report, some of them as texts.
    fields = dict(report)
    for name in ("hardware", "settings", "system", "versions"):
        fields[name] = _listed(report[name])
    fields["aims"] = _aims_table(report["aims"])
    fields["sections"] = "\n".join(parts)
    return REPORT.format(**fields)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _listed(values: JsonObject) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in values.items() if not isinstance(value, Mapping)
    )


def _leaves(value: JsonObject, above: str = "") -> Iterator[tuple[str, object]]:
    """Label -> number for all values of a section."""
    for key, inner in value.items():
        label = above.format(key) if "{}" in above else f"{above} {_label(key)}".strip()
        if isinstance(inner, dict) and "low" not in inner:
            yield from _leaves(inner, label)
        else:
            yield label, inner


def _show(value: Any) -> str:
    """A table cell: an estimate with its interval, a plain number, or a dash."""
    if isinstance(value, Mapping) and value["value"] is not None:
        return f"{value['value']:.3f} ({value['low']:.2f}–{value['high']:.2f}), n {value['n']}"
    if value is None or isinstance(value, Mapping):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _label(key: str) -> str:
    return TITLES.get(key, key.replace("_", " "))


def _value(figure: Any) -> Any:
    """The number of an estimate, or the figure itself."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def _aims_table(aims: Sequence[JsonObject]) -> str:
    """Value / aim (ceiling); values that miss the aim are bold."""
    splits = list(dict.fromkeys(aim["split"] for aim in aims))
    cells: dict[str, dict[str, str]] = {}
    for aim in aims:
        value = f"{aim['value']:.3f}" if aim["met"] else f"**{aim['value']:.3f}**"
        ceiling = "" if aim["ceiling"] is None else f" ({aim['ceiling']:.3f})"
        at_most = "≤ " if aim["at_most"] else ""
        row = cells.setdefault(aim["what"], dict.fromkeys(splits, "–"))
        row[aim["split"]] = f"{value} / {at_most}{aim['aim']:.2f}{ceiling}"
    return table(("", *splits), [(what, *row.values()) for what, row in cells.items()])


def _save_sheets(runs: Sequence[Run], out: Path) -> list[str]:
    """The rows of all splits as WebP, with the best quality under `MAX_BYTES`."""
    rows_of: dict[str, list[Row]] = {}
    for run in runs:
        for name, rows in run.sheets.items():
            rows_of.setdefault(name, []).extend(rows)
    names = []
    for name, rows in rows_of.items():
        # The best quality that is small enough.
        sheet = contact_sheet(rows, _label(name).capitalize(), 72, 12, 8)
        for quality in (85, 75, 60, 45):
            content = image_to_bytes(sheet, "WEBP", quality=quality, method=6)
            if len(content) <= MAX_BYTES:
                break
        with atomic_open(out / f"{name}.webp") as handle:
            handle.write(content)
        names.append(f"{name}.webp")
    return names
