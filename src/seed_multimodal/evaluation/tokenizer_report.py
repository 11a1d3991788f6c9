"""Files of a tokenizer's evaluation: report.json, report.md, the contact sheet, and a line in evaluate.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.disk import replace_text, replacing, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.markdown import facts, show, table
from seed_multimodal.evaluation.metrics import plain
from seed_multimodal.evaluation.tokenizer_pass import PassResult
from seed_multimodal.images.sheet import Cell, contact_sheet, interleaved_rows

COLUMNS, CELL = 8, 96
LEVELS = (1, 5, 10)
DEFINITIONS = """\
Numbers are shares with a 95 % bootstrap interval and the number of samples. *txt R@k*: one of the picture's captions is
among its k nearest texts; *img R@k*: the caption's picture is among its k nearest pictures (captions of one picture are
resampled together). A caption that two pictures share letter for letter is right for both; ties count as wrong.
*Cosine to others* is what two different pictures have in common: only the distance from it means anything.
"""
NAMES = {
    "embedding": "decoded embedding against CLIP's embedding of the picture",
    "picture_clip": "rebuilt picture against the picture, under CLIP",
}


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report (plain JSON values) as Markdown."""
    parts = [f"# Tokenizer {report['model']}\n",
             f"{report['n']} pictures with {report['captions']} captions ("
             + ", ".join(f"{key} {value}" for key, value in report["data"].items()) + ")"
             + (f"; {len(report['left_out'])} could not be read" if report["left_out"] else "") + ".\n", DEFINITIONS,
             "## Image ↔ text retrieval\n", _retrieval(report["retrieval"]), "## Reconstruction\n",
             _reconstruction(report["reconstruction"]), "## Codes\n", _codes(report["codes"])]
    if report["left_out"]:
        parts += ["## Left out\n", "".join(f"* {line}\n" for line in report["left_out"])]
    parts += ["## To look at\n", f"![{report['sheet']}]({report['sheet']})\n", "## How it was measured\n",
              facts(report, f"{report['runtime']}: ")]
    return "\n".join(parts)


def _retrieval(section: Mapping[str, Any]) -> str:
    routes = section["routes"]
    if not routes:
        return ("Not measured: a tokenizer alone has no text side. Give a stage-1 checkpoint (`--stage1`) or a CLIP "
                "text tower (`--clip-text`).\n")
    head = ("from", *(f"txt R@{k}" for k in LEVELS), *(f"img R@{k}" for k in LEVELS), "mean", "chance, R@1")
    rows = [(name, *(show(route[f"txt_r{k}"]) for k in LEVELS), *(show(route[f"img_r{k}"]) for k in LEVELS),
             show(route["r_mean"]), f"{route['chance']['txt_r1']:.4f} / {route['chance']['img_r1']:.4f}")
            for name, route in routes.items()]
    notes = [f"* `{name}`: {route['route']}; text: {route['text']}; {route['n']} pictures, {route['texts']} texts, "
             f"k_test {route['k_test']}.\n" for name, route in routes.items()]
    codes = section["causal_codes"]
    said = f"`{codes}` is the figure for the codes here." if codes else "No route from the codes to a text is there."
    return "\n".join((table(head, rows), "".join(notes), said + "\n"))


def _reconstruction(section: Mapping[str, Any]) -> str:
    rows = [(NAMES[name], show(part["cosine"]), show(part["cosine_to_others"]), show(part["picture_r1"]),
             show(part["picture_r5"]), str(part["gallery"])) for name in NAMES if (part := section.get(name))]
    if not rows:
        return "Not measured: no CLIP tower of the decoded embedding's width and no decoder were found.\n"
    text = table(("", "cosine", "cosine to others", "right picture first", "among five", "gallery"), rows)
    if "embedding" in section:
        text += f"\nMean squared error of the embedding: {show(section['embedding']['mse'])}.\n"
    return text + (f"\nCLIP: `{section['clip']}`.\n" if section["clip"] else "")


def _codes(section: Mapping[str, Any]) -> str:
    labels = {"sequences": "pictures", "codebook": "codes in the codebook", "used": "codes used",
              "usage": "share used", "perplexity": "perplexity of all codes",
              "position_perplexity": "perplexity at one position, mean", "distinct": "distinct sequences"}
    rows = [(label, show(section[key])) for key, label in labels.items()]
    rows += [(f"entropy of the first {n} codes, bits", show(bits)) for n, bits in section["prefix_bits"].items()]
    return table(("", ""), rows)


def reconstruction_sheet(seen: PassResult, rebuilt: Sequence[Image.Image], real: Sequence[Image.Image],
                         nearest: Sequence[Image.Image]) -> Image.Image:
    """Pictures with a caption, above what their codes draw (where they were drawn) and the other picture whose
    codes decode nearest; the first of the sample, good or bad."""
    rows = interleaved_rows(
        COLUMNS, ("picture", [Cell(picture, captions[0]) for picture, captions
                              in zip(real, seen.captions, strict=False)]),
        ("from 32 codes", [Cell(picture) for picture in rebuilt[:len(real)]]),
        ("nearest other by its codes", [Cell(picture) for picture in nearest]))
    return contact_sheet(rows, f"{len(seen.rows)} pictures", CELL, COLUMNS, 4)


def write_report(report: dict[str, Any], sheet: Image.Image, out: Path) -> None:
    """Write report.json, report.md and the sheet; append the retrieval lines to evaluate.txt.

    Raises:
        ConfigError: the folder cannot be written.
    """
    report["sheet"] = "reconstructions.jpg"
    values = plain(report)
    lines = [{"features": name, "route": route["route"], "text": route["text"], "model": values["model"],
              "n": route["n"], **route["lavis"]} for name, route in values["retrieval"]["routes"].items()]
    with writing(out, ConfigError):
        replace_text(out / "report.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        with replacing(out / report["sheet"]) as file:
            sheet.save(file, "JPEG", quality=88)
        replace_text(out / "report.md", markdown(values))
        with open(out / "evaluate.txt", "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(line) + "\n" for line in lines)
