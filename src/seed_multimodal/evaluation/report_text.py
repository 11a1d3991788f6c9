"""report.md: the numbers of report.json as tables, definitions first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seed_multimodal.evaluation.metrics import Estimate

# (what, split, where in the split's sections, aim)
AIMS = (
    ("reconstruction, right picture first", "val", ("reconstruction", "picture_r1"), 0.80),
    ("drawing, right picture among five", "val", ("drawing", "picture_r5"), 0.80),
    ("drawing, right picture among five", "test_combo", ("drawing", "picture_r5"), 0.60),
    ("caption names the thing", "test_combo", ("caption", "concept"), 0.70),
    ("questions answered", "val", ("qa", "all"), 0.90),
    ("questions answered", "test_combo", ("qa", "all"), 0.90),
    ("codebook entries used", "val", ("codes", "usage"), 0.50),
)

# title, [(row, where)]
TABLES: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    ("Codes (all pictures of the split)", (
        ("pictures", ("pictures",)),
        ("share of the codebook used", ("codes", "usage")),
        ("perplexity of all codes", ("codes", "perplexity")),
        ("perplexity at one position, mean", ("codes", "position_perplexity")),
        ("distinct sequences", ("codes", "distinct")),
        ("entropy of the first 4 codes, bits", ("codes", "prefix_bits", "4")),
        ("entropy of all 32 codes, bits", ("codes", "prefix_bits", "32")),
    )),
    ("Reconstruction (picture → 32 codes → picture)", (
        ("**right picture first** (R@1, split)", ("reconstruction", "picture_r1")),
        ("R@5, split", ("reconstruction", "picture_r5")),
        ("R@1 among all pictures", ("reconstruction", "picture_r1_all")),
        ("cosine to the original", ("reconstruction", "cosine")),
        ("right text first", ("reconstruction", "text_r1")),
        ("right style", ("reconstruction", "style")),
        ("pictures in the gallery, split", ("reconstruction", "gallery_pictures")),
        ("pictures in the gallery, all", ("reconstruction", "gallery_all")),
        ("chance R@1", ("chance", "picture_r1")),
    )),
    ("Drawing (text → picture)", (
        ("R@1, real pictures of the split", ("drawing", "picture_r1")),
        ("**R@5**, real pictures of the split", ("drawing", "picture_r5")),
        ("R@1 among all pictures", ("drawing", "picture_r1_all")),
        ("R@1, texts of the split", ("drawing", "text_r1")),
        ("R@5, texts of the split", ("drawing", "text_r5")),
        ("right style", ("drawing", "style")),
        ("cosine to the real picture", ("drawing", "cosine")),
        ("pictures in the gallery, split", ("drawing", "gallery_pictures")),
        ("pictures in the gallery, all", ("drawing", "gallery_all")),
        ("texts in the gallery", ("drawing", "gallery_texts")),
        ("chance R@5, pictures", ("chance", "picture_r5")),
        ("answers without a picture", ("drawing", "without_picture")),
    )),
    ("Description (picture → text)", (
        ("**names the thing**", ("caption", "concept")),
        ("names the style", ("caption", "style")),
        ("both", ("caption", "concept_and_style")),
        ("nearest label is right", ("caption", "concept_nearest")),
        ("labels in the gallery", ("caption", "labels")),
    )),
    ("Questions", (
        ("**all**", ("qa", "all")),
        ("without looking (majority)", ("qa", "blind")),
        ("questions", ("qa", "n")),
    )),
    ("Edits (picture + instruction → picture)", (
        ("**right thing and style**", ("edit", "concept_and_style")),
        ("right thing", ("edit", "concept")),
        ("right style", ("edit", "style")),
        ("left as it was", ("edit", "left_unchanged")),
        ("pictures in the gallery", ("edit", "gallery_pictures")),
        ("answers without a picture", ("edit", "without_picture")),
    )),
    ("Ceilings", (
        ("judge on real pictures: right text first", ("ceilings", "real", "text_r1")),
        ("judge on real pictures: among five texts", ("ceilings", "real", "text_r5")),
        ("judge on real pictures: style", ("ceilings", "real", "style")),
        ("VAE round trip: right picture first", ("ceilings", "vae", "picture_r1")),
        ("VAE round trip: cosine", ("ceilings", "vae", "cosine")),
    )),
)

DEFINITIONS = """\
Scored by an independent judge (another architecture and seed, trained on all splits, never used in training).
Numbers are shares with a 95 % bootstrap interval and the number of samples.

* *Right picture first / among five*: the made picture's nearest real pictures under the judge; for a reconstruction the
  original itself is right, for a drawing any real picture with the asked caption. The gallery is every real
  picture of the split, or of all splits where it says so.
* *Right text*: the same against the different canonical captions ("a STYLE drawing of THING") of the split.
* *Names the thing / style*: the label, or the style's name, stands in the description as whole words (case, articles
  and punctuation ignored). *Nearest label*: the judge's nearest label to the description, among those of the split.
* *Questions*: exact match after the same normalisation; intervals resample pictures. *Without looking*: always the
  most frequent training answer of the kind.
* *Edits*: the nearest real picture (of the split and the given ones) has the target's label and style. *Left as it
  was*: the nearest is the given picture.
* Ties and answers without a whole picture count as wrong.
"""


def value_at(section: Mapping[str, Any], path: Iterable[str]) -> Any:
    """The value at `path`, or None where any step is missing."""
    value: Any = section
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def aims(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The aims that the measured splits cover, each with its value and whether it is met."""
    found = []
    for what, split, path, aim in AIMS:
        value = value_at(splits.get(split, {}), path)
        number = value.value if isinstance(value, Estimate) else value
        if number is not None and not math.isnan(number):
            found.append({"what": what, "split": split, "aim": aim, "value": round(float(number), 4),
                          "met": bool(number >= aim)})
    return found


def show(value: Any) -> str:
    """A table cell: an estimate with its interval, a plain number, or a dash."""
    if isinstance(value, Mapping) and "low" in value:
        if value["value"] is None:
            return "–"
        return f"{value['value']:.3f} ({value['low']:.2f}–{value['high']:.2f}), n {value['n']}"
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report (plain JSON values) as Markdown."""
    splits = report["splits"]
    names = list(splits)
    parts = [f"# Report card of {report['model']}\n", DEFINITIONS, "## Aims\n", table(
        ("what", "split", "aim", "measured", "met"),
        [(a["what"], a["split"], f"{a['aim']:.2f}", f"{a['value']:.3f}", "yes" if a["met"] else "no")
         for a in report["aims"]])]
    for title, rows in TABLES:
        body = [(label, *(show(value_at(splits[name], path)) for name in names)) for label, path in rows]
        body = [row for row in body if any(cell != "–" for cell in row[1:])]
        if body:
            parts += [f"## {title}\n", table(("", *names), body)]
            if title == "Questions":
                parts.append(_kinds(splits, ("qa", "kinds"), "kind of question", ("accuracy",)))
            if title.startswith("Edits"):
                parts.append(_kinds(splits, ("edit", "kinds"), "kind of edit (right thing and style)", ()))
    if report.get("sheets"):
        parts += ["## To look at\n", *(f"![{name}]({name})\n" for name in report["sheets"])]
    parts += ["## How it was measured\n", facts(report)]
    return "\n".join(parts)


def _kinds(splits: Mapping[str, Any], path: tuple[str, ...], title: str, inside: tuple[str, ...]) -> str:
    kinds = sorted({kind for section in splits.values() for kind in value_at(section, path) or {}})
    rows = [(kind, *(show(value_at(section, (*path, kind, *inside))) for section in splits.values())) for kind in kinds]
    return table((title, *splits), rows) if rows else ""


def facts(report: Mapping[str, Any], where: str = "") -> str:
    """How a report was measured: command, date, machine (`where`: what of it was used), settings, versions.

    Keys `system` and `judge` are there where a whole system was measured.
    """
    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, Mapping))

    judge = listed(report.get("judge", {}))
    lines = [f"`{report['command']}`",
             f"{report['date']}, commit {report['commit']}, {report['seconds']} s on {where}"
             + listed(report["hardware"]), "Settings: " + listed({**report["settings"], **report.get("system", {})}),
             f"Judge: {judge}" if judge else "", "Versions: " + listed(report["versions"])]
    return "".join(f"* {line}\n" for line in lines if line)
