"""Contact sheets of a report, one for each kind of answer, a few rows a split.

The first of each list are shown, good or bad: nothing is picked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from seed_multimodal.disk import replacing
from seed_multimodal.errors import counted
from seed_multimodal.images.code_strip import code_strip
from seed_multimodal.images.encode import image_to_bytes
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_nano.report.longer_run import Seen
from seed_nano.report.split_run import SplitRun
from seed_nano.world.scene import render
from seed_nano.world.words import describe

COLUMNS, CELL, ROWS = 10, 72, 6
MAX_BYTES = 140_000
Runs = Sequence[SplitRun]


def save_sheets(runs: Runs, out: Path) -> list[str]:
    """Write the sheets that there are pictures for into `out`, as WebP; returns their names."""
    names = []
    for kind in runs[0].sheets:
        title, rows = SHEETS[kind]
        found = rows(runs)
        if found:
            names.append(save_small(contact_sheet(found, title, CELL, 12, 8), out / f"{kind}.webp"))
    return names


def save_small(sheet: Image.Image, file: Path) -> str:
    """Save as WebP, whole or not at all, with the best quality that stays under `MAX_BYTES`; returns the file's name.
    Raises OSError."""
    for quality in (85, 75, 60, 45):
        content = image_to_bytes(sheet, "WEBP", quality=quality, method=6)
        if len(content) <= MAX_BYTES:
            break
    with replacing(file) as handle:
        handle.write(content)
    return file.name


def _real(run: SplitRun, number: int = COLUMNS) -> list[Cell]:
    return [Cell(Image.fromarray(picture)) for picture in run.real[:number]]


def _made(run: SplitRun, kind: str) -> list[Cell]:
    return [Cell(picture) for picture in run.pictures.get(kind, [])[:COLUMNS]]


def _reconstructions(runs: Runs) -> list[Row]:
    return [row for run in runs for row in (Row(f"{run.samples.split}: original", _real(run)),
                                            Row(f"rebuilt from {run.rebuilt_from}", _made(run, "rebuilt")))]


def _drawings(runs: Runs) -> list[Row]:
    return [Row(run.samples.split, [Cell(picture, asked=describe(scene)) for picture, scene in zip(
        run.pictures["drawn"][:COLUMNS], run.samples.scenes, strict=False)]) for run in runs if "drawn" in run.pictures]


def _edits(runs: Runs) -> list[Row]:
    rows = []
    for run in runs:
        for start in (0, 3):
            cells = []
            for (scene, edit), result in list(zip(run.samples.edits, run.pictures.get("edited", []), strict=False)
                                              )[start:start + 3]:
                before, after = (Image.fromarray(render(one, run.system.image_size)) for one in (scene, edit.target))
                cells += [Cell(before, "given"), Cell(result, asked=edit.instruction, arrow=True),
                          Cell(after, "what was asked")]
            rows += [Row(run.samples.split if start == 0 else "", cells)] if cells else []
    return rows


def _conversations(runs: Runs) -> list[Row]:
    return [Row(run.samples.split if i == 0 else "", [
        cell for asked, said in zip(talk[::2], talk[1::2], strict=True) for cell in _turn(asked[1], said[1])])
        for run in runs for i, talk in enumerate(run.talks[:4])]


def _turn(asked: Seen, said: Seen) -> list[Cell]:
    """The pictures of a request, and its words above the answer's picture (an empty box: words alone) and words."""
    given = [Cell(part, "given") for part in asked if not isinstance(part, str)]
    words, answer = (" ".join(part for part in parts if isinstance(part, str)) for parts in (asked, said))
    picture = next((part for part in said if not isinstance(part, str)), None)
    return [*given, Cell(picture, answer, words)]


def _stories(runs: Runs) -> list[Row]:
    rows = []
    for run in runs:
        for request, *answer in run.stories[:3]:
            before = ["", *answer]
            frames = [Cell(part, asked=said if isinstance(said, str) else "", wide=2)
                      for said, part in zip(before, answer, strict=False) if not isinstance(part, str)]
            rows.append(Row(str(request), frames))
    return rows


def _examples(runs: Runs) -> list[Row]:
    return [Row(run.samples.split if i == 0 else "", [
        Cell(None if isinstance(part, str) else part, arrow=place in (1, 3, 5)) for place, part in enumerate(row)])
        for run in runs for i, row in enumerate(run.examples[:ROWS])]


def _ladder(runs: Runs) -> list[Row]:
    run = runs[0]
    rungs = (("VAE round trip", "vae"), ("drawn from the true embedding", "embedding"),
             ("drawn from 32 codes", "rebuilt"), ("drawn from words", "drawn"))
    return [Row("original", _real(run)), *(Row(name, _made(run, kind)) for name, kind in rungs if kind in run.pictures)]


def _progressive(runs: Runs) -> list[Row]:
    run = runs[0]
    prefixes = [kind for kind in run.pictures if kind.startswith("first ")]
    return [*(Row(f"{kind} codes", _made(run, kind)) for kind in prefixes), Row("original", _real(run))]


def _codes(runs: Runs) -> list[Row]:
    run = runs[0]
    return [Row("", [cell, Cell(code_strip(run.codes[i].tolist(), run.system.section), describe(scene), wide=6)])
            for i, (cell, scene) in enumerate(zip(_real(run, ROWS), run.samples.scenes, strict=False))]


def _conditioned(runs: Runs) -> list[Row]:
    return [Row(run.samples.split if start == 0 else "", [
        cell for (scene, edit), result in list(zip(run.samples.edits, run.pictures.get("conditioned", []), strict=False)
                                               )[start:start + 3]
        for cell in (Cell(Image.fromarray(render(scene, run.system.image_size)), "condition"), Cell(result, arrow=True),
                     Cell(Image.fromarray(render(edit.target, run.system.image_size)), "original"))])
        for run in runs for start in (0, 3) if run.pictures.get("conditioned")]


def _detections(runs: Runs) -> list[Row]:
    return [Row(f"{run.samples.split}{title}", [
        Cell(picture, asked=asked) for picture, asked in zip(run.pictures[name], run.answers[f"{name}_asked"],
                                                             strict=False)])
        for run in runs for name, title in (("detection", ""), ("wide_detection", ", wide")) if name in run.pictures]


def _wide(runs: Runs) -> list[Row]:
    return [Row(run.samples.split, [cell for picture, answer in zip(run.pictures["wide"], run.answers["wide"],
                                                                     strict=False)
                                    for cell in (Cell(picture, answer["text"], wide=2),)])
            for run in runs if "wide" in run.pictures]


def _kept(runs: Runs) -> list[Row]:
    def row(run: SplitRun, label: str, kind: str) -> Row:
        return Row(label, [Cell(picture, counted(number, "token")) for picture, number in zip(
            run.pictures[kind], run.answers[kind], strict=True)])

    return [row(runs[0], "no thing", "kept_empty"), *(row(run, run.samples.split, "kept") for run in runs)]


def _wide_drawings(runs: Runs) -> list[Row]:
    return [Row(run.samples.split, [Cell(picture, asked=describe(scene), wide=2) for picture, scene in zip(
        run.pictures["wide_drawn"][:ROWS], run.samples.scenes, strict=False)])
        for run in runs if "wide_drawn" in run.pictures]


def _composed(runs: Runs) -> list[Row]:
    return [Row(run.samples.split, [Cell(picture, arrow=place % 3 == 2) for place, picture in
                                    enumerate(run.pictures["composed"])]) for run in runs if "composed" in run.pictures]


SHEETS: dict[str, tuple[str, Callable[[Runs], list[Row]]]] = {
    "reconstructions": ("Rebuilt", _reconstructions), "drawings": ("Drawn from words", _drawings),
    "edits": ("Edited", _edits), "conversations": ("Conversations, after its own answers", _conversations),
    "stories": ("Stories", _stories), "examples": ("The same change for a third picture", _examples),
    "ladder": ("The ladder", _ladder), "progressive": ("From the first codes only", _progressive),
    "conditioned": ("Rebuilt beside the picture before an edit", _conditioned),
    "detections": ("Found", _detections), "wide": ("Wide scenes, described", _wide),
    "kept": ("Patches that become tokens", _kept), "wide_drawings": ("Drawn from words in 3:2", _wide_drawings),
    "composed": ("Composed of two pictures", _composed),
    "codes": ("Pictures and their codes: equal colours in a column are equal codes", _codes),
}
