"""Contact sheets of a report: rebuilt pictures, drawings and edits of each split, beside the real ones.

The first pictures of the random sample are shown, good or bad: nothing is picked by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.evaluation.tasks import World
from seed_multimodal.images.sheet import Cell, Row, contact_sheet, interleaved_rows

SHOWN, COLUMNS, CELL = 24, 8, 80
MAX_BYTES = 300_000
Pictures = Sequence[Image.Image | None]


@dataclass
class SheetPictures:
    """Pictures made for one split, in the order of `targets` (rows of the data set) and `edits`."""

    split: str
    targets: list[int]
    rebuilt: Pictures
    drawn: Pictures
    texts: list[str]
    edits: list[Any]
    edited: Pictures


def save_sheets(shown: Sequence[SheetPictures], world: World, out: Path) -> list[str]:
    """Write up to three JPEG sheets a split into `out`; returns their names."""
    names = []
    for part in shown:
        sheets = {"reconstructions": reconstruction_sheet(part, world), "drawings": drawing_sheet(part, world)}
        if part.edits:
            sheets["edits"] = edit_sheet(part, world)
        for kind, sheet in sheets.items():
            names.append(save_small(sheet, out / f"{kind}_{part.split}.jpg"))
    return names


def reconstruction_sheet(part: SheetPictures, world: World) -> Image.Image:
    """Real pictures above their rebuilt copies, with the description under each copy."""
    rows = interleaved_rows(
        COLUMNS, ("real", [Cell(_real(world, t), world.nano.records[t].label) for t in part.targets[:SHOWN]]),
        ("from 32 codes; described as",
         [Cell(p, text) for p, text in zip(part.rebuilt[:SHOWN], part.texts[:SHOWN], strict=True)]))
    return contact_sheet(rows, f"Reconstructions: {part.split}", CELL, COLUMNS, 5)


def drawing_sheet(part: SheetPictures, world: World) -> Image.Image:
    """Requests and drawings, above the real picture of that name."""
    targets = part.targets[:SHOWN]
    rows = interleaved_rows(
        COLUMNS, ("drawn from the words",
                  [Cell(p, world.names[t]) for p, t in zip(part.drawn[:SHOWN], targets, strict=True)]),
        ("real picture of that name", [Cell(_real(world, t)) for t in targets]))
    return contact_sheet(rows, f"Drawings: {part.split}", CELL, COLUMNS, 5)


def edit_sheet(part: SheetPictures, world: World) -> Image.Image:
    """Source, result and the real target of each edit, three edits a row."""
    rows, wide = [], 3
    edits = list(zip(part.edits, part.edited, strict=True))[: SHOWN // 2]
    for start in range(0, len(edits), wide):
        cells = []
        for edit, result in edits[start : start + wide]:
            source, target = world.nano.index[edit.source], world.nano.index[edit.target]
            cells += [Cell(_real(world, source), "given"), Cell(result, edit.instruction),
                      Cell(_real(world, target), "real target")]
        rows.append(Row("", cells))
    return contact_sheet(rows, f"Edits: {part.split}", CELL, 3 * wide, 5)


def save_small(sheet: Image.Image, file: Path) -> str:
    """Save as JPEG with the best quality that stays under `MAX_BYTES`; returns the file's name."""
    for quality in (90, 80, 65, 50):
        sheet.save(file, quality=quality, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            break
    return file.name


def _real(world: World, row: int) -> Image.Image:
    return Image.fromarray(world.nano.images()[row])
