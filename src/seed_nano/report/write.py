"""The files of a report: report.json, answers.json.gz, report.md, sheets and plots."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.disk import replace_text, replacing, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.metrics import Estimate, plain
from seed_multimodal.images.encode import image_to_bytes
from seed_multimodal.images.sheet import contact_sheet
from seed_multimodal.training.plots import COLOURS, figure_kind
from seed_nano.report.markdown import facts, show, table
from seed_nano.report.sections import AT_MOST, REPORT, Run

MAX_BYTES = 140_000  # of a sheet
PLOTS: dict[str, tuple[str, dict[str, str]]] = {  # file -> title, label -> path in the sections
    "ladder.png": ("share of images with every label right", {
        "real": "ladder.ceiling", "VAE": "ladder.vae.all", "embedding": "ladder.embedding.all",
        "codes": "reconstruction.all", "words": "drawing.all"}),
    "codes_curve.png": ("share with every label right after the first codes", {
        str(number): f"prefix.{number}.all" for number in (4, 8, 16, 32)}),
    "tokens.png": ("tokens of an image by the number of things in it", {
        str(number): f"tokens.things.{number}.mean" for number in range(5)})}
HEAD = """\
Images are read by an independent judge (another architecture and seed than the system's, trained on scenes of all
splits, never used in training); *ceiling* is its share of real images with every label right. Numbers are shares with a
95 % bootstrap interval (scenes resampled) and the number of samples. Splits hold out the very scene (val), two things
together (pairs), a thing on a background (places), in a number (counts), in a style (styles), and things altogether
(things: only rebuilt). Labels: first thing (left, above or alone), second thing, style, background, layout with counts;
*all* needs all five. An answer without a whole image is wrong.
"""


def write_report(report: Mapping[str, Any], kind: str, runs: Sequence[Run], out: Path) -> None:
    """Write all files into `out`. Raises ConfigError: a file cannot be written; what was written before it stays."""
    with writing(out, ConfigError):
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "report.json", json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n")
        answers = {run.samples.split: run.answers for run in runs}
        with replacing(out / "answers.json.gz") as file:
            file.write(gzip.compress((json.dumps(answers, ensure_ascii=False) + "\n").encode(), mtime=0))
        images = [*_save_plots(report["splits"], out), *_save_sheets(runs, out)]
        replace_text(out / "report.md", markdown(plain(report), kind, images))


def aims(kind: str, splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The aims that the measured splits cover, each with its value, the judge's ceiling and whether it is met."""
    found = []
    for path, wanted in REPORT[kind][1].items():
        for split, aim in wanted.items():
            value = _number(value_at(splits.get(split, {}), path))
            if value is not None:
                ceiling = _number(value_at(splits[split], (path[0], "ceiling"))) if path[1] != "r1" else None
                most = {"at_most": True} if path in AT_MOST else {}
                found.append({"what": ", ".join(map(_label, path)), "split": split, "aim": aim,
                              "value": round(value, 4), "ceiling": ceiling,
                              "met": bool(value <= aim if most else value >= aim), **most})
    return found


def value_at(section: Mapping[str, Any], path: Iterable[str]) -> Any:
    """The value at `path`, or None where any step is missing."""
    value: Any = section
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def markdown(report: Mapping[str, Any], kind: str, images: Sequence[str]) -> str:
    """The whole report (plain JSON values) as Markdown; `images`: names of the sheets and plots."""
    splits = report["splits"]
    parts = [f"# Report of {report['model']}\n", HEAD, "## Aims\n\nMeasured / aim (ceiling); missed aims are bold.\n",
             _aims_table(report["aims"])]
    for section in REPORT[kind][0]:
        name = section.__name__
        columns = {split: dict(_leaves(found[name])) for split, found in splits.items() if name in found}
        labels = dict.fromkeys(label for column in columns.values() for label in column)
        if columns:
            parts += [f"## {_label(name).capitalize()}\n", f"{getdoc(section)}\n", table(("", *columns), [
                (label, *(show(column.get(label)) for column in columns.values())) for label in labels])]
    parts += [f"![{name}]({name})\n" for name in images]
    return "\n".join([*parts, "## How it was measured\n", facts(report)])


def _leaves(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Label -> number of everything in a section; confusions are one cell."""
    for key, inner in value.items():
        label = f"{above} {_label(key)}".strip()
        if key == "confused":
            yield label, ", ".join(f"{pair} ({times})" for pair, times in inner.items()) or "–"
        elif isinstance(inner, Mapping) and "low" not in inner:
            yield from _leaves(inner, label)
        else:
            yield label, inner


def _label(key: str) -> str:
    return key.replace("_", " ")


def _number(value: Any) -> float | None:
    number = value.value if isinstance(value, Estimate) else value
    return None if number is None or math.isnan(number) else float(number)


def _aims_table(found: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for aim in found:
        number = f"{aim['value']:.3f}" if aim["met"] else f"**{aim['value']:.3f}**"
        ceiling = "" if aim["ceiling"] is None else f" ({aim['ceiling']:.3f})"
        least = "≤ " if aim.get("at_most") else ""
        cells.setdefault(aim["what"], {})[aim["split"]] = f"{number} / {least}{aim['aim']:.2f}{ceiling}"
    splits = list(dict.fromkeys(aim["split"] for aim in found))
    return table(("", *splits), [(what, *(row.get(split, "–") for split in splits)) for what, row in cells.items()])


def _save_plots(splits: Mapping[str, Any], out: Path) -> list[str]:
    names = []
    for name, (title, points) in PLOTS.items():
        rows = {split: [value_at(found, path.split(".")) for path in points.values()]
                for split, found in splits.items()}
        if any(row[0] for row in rows.values()):
            axes = figure_kind()(figsize=(7.5, 3.6), dpi=100, layout="constrained").add_subplot(title=title)
            for colour, (split, row) in zip(COLOURS, rows.items(), strict=False):
                there = [(label, one) for label, one in zip(points, row, strict=True) if one]
                axes.errorbar([label for label, _ in there], [one.value for _, one in there], yerr=[
                    [one.value - one.low for _, one in there], [one.high - one.value for _, one in there]],
                    color=colour, marker="o", markersize=4, linewidth=0.8, capsize=2, label=split)
            axes.set_ylim(0)
            axes.legend(fontsize=8, frameon=False, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.5, -0.08))
            with replacing(out / name) as handle:
                axes.figure.savefig(handle, format="png")
            names.append(name)
    return names


def _save_sheets(runs: Sequence[Run], out: Path) -> list[str]:
    """The rows of all splits, as WebP of the best quality under `MAX_BYTES`."""
    names = []
    for name in dict.fromkeys(name for run in runs for name in run.sheets):
        rows = [row for run in runs for row in run.sheets.get(name, ())]
        sheet: Image.Image = contact_sheet(rows, _label(name).capitalize(), 72, 12, 8)
        contents = (image_to_bytes(sheet, "WEBP", quality=quality, method=6) for quality in (85, 75, 60, 45))
        *_, content = iter(_until_small(contents))
        with replacing(out / f"{name}.webp") as handle:
            handle.write(content)
        names.append(f"{name}.webp")
    return names


def _until_small(contents: Iterable[bytes]) -> Iterator[bytes]:
    for content in contents:
        yield content
        if len(content) <= MAX_BYTES:
            return
