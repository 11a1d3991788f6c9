"""report.md: the numbers of report.json as tables, definitions first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seed_multimodal.evaluation.markdown import facts, show, table
from seed_multimodal.evaluation.metrics import Estimate
from seed_nano.report.sizes import REPORTED, ROWS

Path = tuple[str, ...]
_FIVE = ("val", "pairs", "places", "counts", "styles")


def _five(*aims: float) -> dict[str, float]:
    return dict(zip(_FIVE, aims, strict=True))


# what, where in a split's sections, split -> aim
AIMS: tuple[tuple[str, Path, dict[str, float]], ...] = (
    ("reconstruction, right picture first", ("reconstruction", "r1"),
     {**_five(0.95, 0.95, 0.95, 0.95, 0.85), "things": 0.80}),
    ("caption, every label right", ("caption", "all"), _five(0.90, 0.85, 0.85, 0.80, 0.50)),
    ("questions answered", ("qa", "all"), _five(0.95, 0.95, 0.95, 0.90, 0.75)),
    ("drawing, every label right", ("drawing", "all"), _five(0.90, 0.85, 0.85, 0.75, 0.50)),
    ("edit, every label right", ("edit", "all"), _five(0.80, 0.75, 0.75, 0.65, 0.45)),
    ("conversation, turns right", ("conversation", "turns"), {"val": 0.85, "pairs": 0.80}),
    ("change by example, every label right", ("examples", "all"), {"val": 0.60}),
    ("story, frames right", ("story", "frames"), {"val": 0.70, "pairs": 0.70}),
    ("codebook entries used", ("codes", "usage"), {"val": 0.50}),
)

# size of a report (evaluation.samples.Sizes) -> what there are so many of
AMOUNTS = {"gallery": "scenes rebuilt", "scenes": "described, drawn and edited", "questions": "questions",
           "conversations": "conversations", "examples": "examples", "stories": "stories (where there are any)"}
# Of a SEED-X.
X_AIMS: tuple[tuple[str, Path, dict[str, float]], ...] = (
    ("caption, every label right", ("caption", "all"), {"val": 0.85}),
    ("boxes, F1", ("detection", "f1"), {"val": 0.85}), ("boxes, precision", ("detection", "precision"), {"val": 0.85}),
    ("boxes, recall", ("detection", "recall"), {"val": 0.85}),
    ("drawing, every label right", ("drawing", "all"), {"val": 0.75}),
    ("edit, every label right", ("edit", "all"), {"val": 0.75}),
    ("edit, PSNR where nothing changes, dB", ("edit", "unchanged_psnr"), {"val": 25.0}),
)
# Of a LaVIT.
LAVIT_AIMS: tuple[tuple[str, Path, dict[str, float]], ...] = (
    ("loss of rebuilt features, 1 − cosine", ("tokens", "cosine"), {"val": 0.2}),
    ("tokens, empty scenes : fullest", ("tokens", "empty_share"), {"val": 0.5}),
    ("caption, every label right", ("caption", "all"), {"val": 0.85}),
    ("drawing, every label right", ("drawing", "all"), {"val": 0.7}),
    ("drawing in 3:2, every label right", ("wide_drawing", "all"), {"val": 0.7}),
)
AT_MOST = (("tokens", "cosine"), ("tokens", "empty_share"))
"""What should be small."""

LABEL_ROWS = (("**every label right**", "all"), ("first thing", "first"), ("second thing", "second"),
              ("style", "style"), ("background", "background"), ("layout and number", "layout"))


def _labels(section: str, *more: tuple[str, str]) -> tuple[tuple[str, Path], ...]:
    return tuple((label, (section, *key.split("."))) for label, key in (*LABEL_ROWS, *more))


_CEILING = ("judge on real pictures: every label", "ceiling")
_MISSING = ("answers without a picture", "without_picture")

# title, [(row, where)]; a table is there for the splits that have its first row
TABLES: tuple[tuple[str, tuple[tuple[str, Path], ...]], ...] = (
    ("Codes", (
        ("pictures", ("codes", "sequences")), ("share of the codebook used", ("codes", "usage")),
        ("perplexity of all codes", ("codes", "perplexity")),
        ("perplexity at one position, mean", ("codes", "position_perplexity")),
        ("distinct sequences", ("codes", "distinct")),
        ("entropy of the first 4 codes, bits", ("codes", "prefix_bits", "4")),
        ("entropy of all 32 codes, bits", ("codes", "prefix_bits", "32")))),
    ("Tokens of a picture", (
        ("mean", ("tokens", "mean")), *((f"{number} {thing}{what}", ("tokens", "things", str(number), key)) for
                                        number, thing in enumerate(("things", "thing", *["things"] * 3))
                                        for what, key in (("", "mean"), (", standard deviation", "spread"))),
        ("**empty scenes : fullest**", ("tokens", "empty_share")),
        ("**loss of rebuilt features**, 1 − cosine", ("tokens", "cosine")),
        ("the same, of the mean picture", ("tokens", "blind")))),
    ("Reconstruction (picture → codes or features → picture)", (
        ("**right picture first** (R@1)", ("reconstruction", "r1")), ("gallery", ("reconstruction", "gallery")),
        *_labels("reconstruction", _CEILING, ("PSNR, dB", "psnr"), ("PSNR on the pixels of things, dB", "psnr_things"),
                 ("SSIM", "ssim")))),
    ("Ladder: every label right, and the first thing", (
        ("judge on real pictures", ("ladder", "ceiling")), ("VAE round trip", ("ladder", "vae", "all")),
        ("true embedding → picture", ("ladder", "embedding", "all")), ("32 codes → picture", ("reconstruction", "all")),
        ("words → codes → picture", ("drawing", "all")), ("VAE: first thing", ("ladder", "vae", "first")),
        ("embedding: first thing", ("ladder", "embedding", "first")),
        ("codes: first thing", ("reconstruction", "first")), ("words: first thing", ("drawing", "first")),
        ("VAE: PSNR on things, dB", ("ladder", "vae", "psnr_things")),
        ("embedding: PSNR on things, dB", ("ladder", "embedding", "psnr_things")))),
    ("Progressive: every label right after the first codes", tuple(
        (f"first {number} codes", ("prefix", str(number), "all")) for number in (4, 8, 16, 32))),
    ("Description (picture → text)", _labels("caption", ("exact sentence", "exact"))),
    ("Questions", (("**all**", ("qa", "all")), ("without looking (majority)", ("qa", "blind")))),
    ("Drawing (text → picture)", _labels("drawing", _CEILING, _MISSING)),
    ("Drawing in 3:2 (the same codes)", _labels("wide_drawing", _CEILING, _MISSING)),
    ("Reconstruction beside the picture before an edit", _labels(
        "conditioned", _CEILING, ("PSNR, dB", "psnr"), ("PSNR on the pixels of things, dB", "psnr_things"),
        ("PSNR where nothing changes, dB", "unchanged_psnr"))),
    ("Boxes (picture + phrase → boxes)", tuple(
        (name, ("detection", name.lower().removeprefix("**").removesuffix("**"))) for name in (
            "**F1**", "precision", "recall"))),
    ("Wide scenes: four times the area, in several views and in one", tuple(
        (f"{what}, {views}", ("wide", f"{prefix}{key}"))
        for what, key in (("every thing at its place", "all"), ("quarters right", "quarters"),
                          ("questions", "questions"), ("boxes, F1", "f1"))
        for views, prefix in (("several views", ""), ("one view", "one_")))),
    ("Edits (picture + instruction → picture)", _labels(
        "edit", ("PSNR where nothing changes, dB", "unchanged_psnr"), ("what was to stay stayed", "stayed"),
        ("left as it was", "unchanged"), _CEILING, _MISSING)),
    ("Pictures of several sizes", tuple(
        (f"{what}, {size} px", ("sizes", str(size), name)) for name, what in ROWS.items() for size in REPORTED)),
    ("Conversations", (
        ("**turns right**", ("conversation", "turns")), ("answers in words", ("conversation", "turns_words")),
        ("answers with a picture", ("conversation", "turns_pictures")),
        ("turns right, after its own answers", ("conversation", "own")),
        ("the judge on their real pictures", ("conversation", "ceiling")))),
    ("Change by example (two examples, then the same for a third picture)", _labels("examples", _CEILING, _MISSING)),
    ("Stories", (("**frames right**", ("story", "frames")), ("sentences right", ("story", "sentences")),
                 ("the judge on real frames", ("story", "ceiling")))),
)
# After these tables: by kind; (title of the table, section, heading, keys of the section)
KINDS = (("Questions", "qa", "kind of question", ("kinds", "blind_kinds")),
         ("Edits (picture + instruction → picture)", "edit", "kind of edit, every label right", ("kinds",)))

DEFINITIONS = """\
Pictures are read by an independent judge (another architecture and seed, trained on scenes of all parts, never used in
training); what it reads right on the real pictures is the ceiling, given beside. Numbers are shares with a 95 %
bootstrap interval (scenes resampled) and the number of samples. The scenes are fixed lists; splits hold out the very
scene (val), two things together (pairs), a thing on a background (places), in a number (counts), in a style (styles),
and things altogether (things: only rebuilt).

* *Labels*: first thing (left, above or alone), second thing, style, background, layout with counts. *Every label right*
  needs all five. A caption must say them all; the request asks for all.
* *Right picture first*: among the gallery's real pictures the original is the nearest to its copy, by the judge's
  features. *PSNR*, *SSIM*: against the original; on the pixels of things by the scene's own mask.
* *Tokens*: patches that are kept. *Fullest*: the scenes with the most things; *empty*: every background without things;
  *standard deviation*: over pictures. *Loss of rebuilt features*: between those that the decoder makes of a picture's
  codes and the vision tower's, mean over patches; *of the mean picture*: with the mean of all pictures instead.
* *Drawing in 3:2*: the scene stretched; judged when squeezed back to the square, as the real pictures of its ceiling.
* *Questions*: exact match (case, articles, punctuation ignored). *Without looking*: always the most frequent training
  answer to the kind.
* *Edits*: the labels of the exact target. *Stayed*: those labels that the instruction leaves are right. *Left as it
  was*: the labels are those of the given picture.
* *PSNR where nothing changes*: against the given picture, over the pixels that are the same in the given picture and
  in the exact target.
* *Boxes*: a box is found if one overlaps it by half or more (intersection over union), each at most once; all boxes of
  the thing that is named are asked for.
* *Wide scenes*: 128 pixels a side, a thing in each quarter or none; *one view*: squashed to 64 pixels.
* *Pictures of several sizes*: the same scenes drawn at so many pixels a side; a box of one of two things is right if
  every box of the thing that is named is found, and none is too many.
* *Conversations*: an answer is right if its words are exact and its picture has every label; earlier turns are the true
  ones, or (*after its own answers*) the system's. Nothing is forced: whether to draw is its choice.
* *Stories*: three or four frames from a request that leaves backgrounds open; a frame is right if its sentence is the
  story's and the picture shows it, background as said.
* Answers without a whole picture count as wrong.
"""


def value_at(section: Mapping[str, Any], path: Iterable[str]) -> Any:
    """The value at `path`, or None where any step is missing."""
    value: Any = section
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def aims(splits: Mapping[str, Any], wanted_of: Sequence[Any] = AIMS) -> list[dict[str, Any]]:
    """The aims that the measured splits cover, each with its value, the judge's ceiling and whether it is met."""
    found = []
    for what, path, wanted in wanted_of:
        for split, aim in wanted.items():
            value = _number(value_at(splits.get(split, {}), path))
            if value is not None:
                ceiling = _number(value_at(splits[split], (path[0], "ceiling"))) if path[1] != "r1" else None
                most = {"at_most": True} if path in AT_MOST else {}
                found.append({"what": what, "split": split, "aim": aim, "value": round(value, 4), "ceiling": ceiling,
                              "met": bool(value <= aim if most else value >= aim), **most})
    return found


def _number(value: Any) -> float | None:
    number = value.value if isinstance(value, Estimate) else value
    return None if number is None or math.isnan(number) else float(number)


def markdown(report: Mapping[str, Any], sheets: Sequence[str] = ()) -> str:
    """The whole report (plain JSON values) as Markdown; `sheets`: names of the pictures to show."""
    splits = report["splits"]
    parts = [f"# Report card of {report['model']}\n", DEFINITIONS, "## Aims\n",
             f"Measured / aim (judge's ceiling); what falls short is bold. Of each split: "
             f"{_amounts(report['settings'])}.\n",
             _aims_table(report["aims"])]
    for title, rows in TABLES:
        body = [(label, *(show(value_at(section, path)) for section in splits.values())) for label, path in rows]
        chosen = [i for i, name in enumerate(splits) if value_at(splits[name], rows[0][1]) is not None]
        body = [row for row in ((row[0], *(row[i + 1] for i in chosen)) for row in body)
                if any(cell != "–" for cell in row[1:])]
        if body:
            parts += [f"## {title}\n", table(("", *(list(splits)[i] for i in chosen)), body)]
            parts += [_kinds(splits, section, heading, key) for of, section, heading, keys in KINDS if of == title
                      for key in keys]
    parts.append(_confused(splits))
    if sheets:
        parts += ["## To look at\n", *(f"![{name}]({name})\n" for name in sheets)]
    parts += ["## How it was measured\n", facts(report)]
    return "\n".join(part for part in parts if part)


def _amounts(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{settings[name]:,} {what}" for name, what in AMOUNTS.items())


def _aims_table(found: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for aim in found:
        number = f"{aim['value']:.3f}" if aim["met"] else f"**{aim['value']:.3f}**"
        ceiling = "" if aim["ceiling"] is None else f" ({aim['ceiling']:.3f})"
        least = "≤ " if aim.get("at_most") else ""
        cells.setdefault(aim["what"], {})[aim["split"]] = f"{number} / {least}{aim['aim']:.2f}{ceiling}"
    splits = list(dict.fromkeys(aim["split"] for aim in found))
    return table(("", *splits), [(what, *(row.get(split, "–") for split in splits)) for what, row in cells.items()])


def _kinds(splits: Mapping[str, Any], section: str, heading: str, key: str) -> str:
    found = {name: value_at(part, (section, key)) or {} for name, part in splits.items()}
    kinds = sorted({kind for row in found.values() for kind in row})
    names = [name for name, row in found.items() if row]
    heading += ", without looking" if key.startswith("blind") else ""
    return table((heading, *names), [(kind, *(show(found[name].get(kind)) for name in names)) for kind in kinds]
                 ) if kinds else ""


def _confused(splits: Mapping[str, Any]) -> str:
    lines = []
    for name, part in splits.items():
        for section, title in (("reconstruction", "rebuilt"), ("drawing", "drawn")):
            wrong = value_at(part, (section, "confused"))
            if wrong:
                lines.append(f"* {name}, {title}: " + ", ".join(f"{pair} ({times})" for pair, times in wrong.items()))
    return "## Things taken for others\n\n" + "\n".join(lines) + "\n" if lines else ""
