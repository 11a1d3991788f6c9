"""Contact sheets: rows of captioned pictures on one page, to be looked at.

Every text is wrapped to the width it has, heights are measured before anything is drawn, so nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER, EMPTY = (24, 24, 28), (110, 110, 118), (255, 255, 255), (238, 238, 240)
_MARGIN, _GAP, _LINE = 16, 10, 4
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass
class Cell:
    """One picture (None leaves an empty box) and the words under it."""

    image: Image.Image | None = None
    caption: str = ""


@dataclass
class Row:
    """A label on the left and cells beside it; cells past the sheet's `columns` continue in the next line."""

    label: str
    cells: list[Cell] = field(default_factory=list)


def interleaved_rows(columns: int, *lines: tuple[str, Sequence[Cell]]) -> list[Row]:
    """Rows for lines of cells that stand above each other: the first `columns` cells of each line, then the next.

    Args:
        lines: (label, cells); a line that is shorter ends earlier.
    """
    longest = max(len(cells) for _, cells in lines)
    return [Row(label, list(cells[start:start + columns])) for start in range(0, longest, columns)
            for label, cells in lines if cells[start:start + columns]]


@dataclass
class _Line:
    """One printed line of cells, with its texts already wrapped."""

    label: list[str]
    cells: list[Cell]
    captions: list[list[str]]
    height: int


def contact_sheet(
    rows: Sequence[Row], title: str = "", cell: int = 128, columns: int = 10, max_lines: int = 10
) -> Image.Image:
    """Lay out `rows` on a white page.

    Args:
        cell: width and height of a picture's box in pixels; pictures keep their shape inside it.
        columns: most cells in a line; a longer row is broken.
        max_lines: captions and labels are cut after so many lines (shown by "…").

    Returns:
        An RGB image, as large as its contents need.
    """
    text = ImageFont.load_default(size=max(11, cell // 10))
    bold = ImageFont.load_default(size=max(15, cell // 7))
    width_of_label = max(cell, 110) if any(row.label for row in rows) else 0
    lines = [line for row in rows for line in _lines(row, cell, columns, width_of_label, text, max_lines)]
    most = max((len(line.cells) for line in lines), default=1)
    left = _MARGIN + (width_of_label + _GAP if width_of_label else 0)
    width = max(left + most * (cell + _GAP) - _GAP + _MARGIN, 360)
    heading = wrap(title, bold, width - 2 * _MARGIN) if title else []
    top = _MARGIN + (len(heading) * _height(bold) + _GAP if heading else 0)
    height = top + sum(line.height + _GAP for line in lines) - (_GAP if lines else 0) + _MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, _MARGIN, _MARGIN, bold, INK)
    for line in lines:
        _write(draw, line.label, _MARGIN, top, text, INK)
        for number, (item, caption) in enumerate(zip(line.cells, line.captions, strict=True)):
            x = left + number * (cell + _GAP)
            _place(sheet, draw, item.image, x, top, cell)
            _write(draw, caption, x, top + cell + _LINE, text, FAINT)
        top += line.height + _GAP
    return sheet


def _lines(row: Row, cell: int, columns: int, label_width: int, font: Font, max_lines: int) -> list[_Line]:
    """A row as one printed line per `columns` cells; the label stands at the first."""
    chunks = [row.cells[i:i + columns] for i in range(0, len(row.cells), columns)] or [[]]
    made = []
    for number, chunk in enumerate(chunks):
        label = _cut(wrap(row.label, font, label_width), max_lines) if number == 0 and row.label else []
        captions = [_cut(wrap(item.caption, font, cell), max_lines) for item in chunk]
        most = max((len(c) for c in captions), default=0)
        pictures = cell + (_LINE + most * _height(font) if most else 0) if chunk else 0
        made.append(_Line(label, chunk, captions, max(pictures, len(label) * _height(font))))
    return made


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break `text` into lines at most `width` pixels wide; words that are longer alone are broken too."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                fits = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _cut(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    return [*lines[:most - 1], lines[most - 1][:-1].rstrip() + "…"]


def _height(font: Font) -> int:
    box = font.getbbox("Ågjpy|")
    return int(box[3]) + _LINE


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, font: Font, ink: tuple[int, int, int]) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * _height(font)), line, font=font, fill=ink)


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | None, x: int, y: int, cell: int) -> None:
    if image is None:
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=EMPTY)
        draw.line((x, y, x + cell - 1, y + cell - 1), fill=PAPER, width=2)
        return
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(shown, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=EMPTY)
