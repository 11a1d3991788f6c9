"""Contact sheets: rows of captioned pictures on one page, light or dark, to be looked at.

Every text is wrapped to the width it has, heights are measured before anything is drawn, so nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_MARGIN, _GAP, _LINE, _ARROW = 16, 10, 4, 14
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Theme:
    """Colours of a page: of words, of remarks, of the page, of frames and empty boxes."""

    ink: Colour
    faint: Colour
    paper: Colour
    empty: Colour


LIGHT = Theme((24, 24, 28), (110, 110, 118), (255, 255, 255), (238, 238, 240))
DARK = Theme((230, 237, 243), (150, 158, 168), (13, 17, 23), (38, 44, 54))  # on GitHub's dark page it has no edge


@dataclass
class Cell:
    """One picture (None leaves an empty box) and the words under it: first `asked`, in the colour of words, then
    `caption`, as a remark. `wide`: so many cells; `arrow`: it comes from the cell before it."""

    image: Image.Image | None = None
    caption: str = ""
    asked: str = ""
    wide: int = 1
    arrow: bool = False


@dataclass
class Row:
    """A label on the left and cells beside it; cells past the sheet's `columns` continue in the next line. Of a label
    of several lines the first is a heading."""

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

    heading: list[str]
    label: list[str]
    cells: list[Cell]
    captions: list[tuple[list[str], list[str]]]  # asked, caption
    height: int


def contact_sheet(
    rows: Sequence[Row], title: str = "", cell: int = 128, columns: int = 10, max_lines: int = 10, theme: Theme = LIGHT
) -> Image.Image:
    """Lay out `rows` on a page.

    Args:
        cell: width and height of a picture's box in pixels; pictures keep their shape inside it.
        columns: most cells in a line; a longer row is broken.
        max_lines: captions and labels are cut after so many lines (shown by "…").

    Returns:
        An RGB image, as large as its contents need.
    """
    text = ImageFont.load_default(size=max(11, cell // 10))
    bold = ImageFont.load_default(size=max(15, cell // 7))
    gap = _GAP + (_ARROW if any(item.arrow for row in rows for item in row.cells) else 0)
    width_of_label = max(cell, 110) if any(row.label for row in rows) else 0
    lines = [line for row in rows for line in _lines(row, cell, gap, columns, width_of_label, text, bold, max_lines)]
    most = max((sum(item.wide for item in line.cells) for line in lines), default=1)
    left = _MARGIN + (width_of_label + _GAP if width_of_label else 0)
    width = max(left + most * (cell + gap) - gap + _MARGIN, 360)
    heading = wrap(title, bold, width - 2 * _MARGIN) if title else []
    top = _MARGIN + (len(heading) * _height(bold) + _GAP if heading else 0)
    height = top + sum(line.height + _GAP for line in lines) - (_GAP if lines else 0) + _MARGIN

    sheet = Image.new("RGB", (width, height), theme.paper)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, _MARGIN, _MARGIN, bold, theme.ink)
    for line in lines:
        below = _write(draw, line.heading, _MARGIN, top, bold, theme.ink)
        _write(draw, line.label, _MARGIN, below, text, theme.faint if line.heading else theme.ink)
        x = left
        for item, (asked, caption) in zip(line.cells, line.captions, strict=True):
            wide = _wide(item, cell, gap)
            _place(sheet, draw, item.image, (x, top, wide, cell), theme)
            if item.arrow:
                _arrow(draw, x - (gap + _ARROW) // 2, top + cell // 2, theme.faint)
            below = _write(draw, asked, x, top + cell + _LINE, text, theme.ink)
            _write(draw, caption, x, below, text, theme.faint)
            x += wide + gap
        top += line.height + _GAP
    return sheet


def _lines(row: Row, cell: int, gap: int, columns: int, label_width: int, text: Font, bold: Font,
           max_lines: int) -> list[_Line]:
    """A row as one printed line per `columns` cells; the label stands at the first."""
    chunks: list[list[Cell]] = [[]]
    for item in row.cells:
        if chunks[-1] and sum(one.wide for one in chunks[-1]) + item.wide > columns:
            chunks.append([])
        chunks[-1].append(item)
    made = []
    for number, chunk in enumerate(chunks):
        first, _, rest = row.label.partition("\n") if number == 0 else ("", "", "")
        heading = wrap(first, bold, label_width) if rest else []
        label = _cut(wrap(rest or first, text, label_width), max_lines) if rest or first else []
        captions = [(_cut(wrap(item.asked, text, _wide(item, cell, gap)), max_lines),
                     _cut(wrap(item.caption, text, _wide(item, cell, gap)), max_lines)) for item in chunk]
        most = max((len(asked) + len(caption) for asked, caption in captions), default=0)
        pictures = cell + (_LINE + most * _height(text) if most else 0) if chunk else 0
        made.append(_Line(heading, label, chunk, captions,
                          max(pictures, len(heading) * _height(bold) + len(label) * _height(text))))
    return made


def _wide(item: Cell, cell: int, gap: int) -> int:
    return item.wide * (cell + gap) - gap


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


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, font: Font, ink: Colour) -> int:
    """Write lines; returns where the next one would begin."""
    for line in lines:
        draw.text((x, y), line, font=font, fill=ink)
        y += _height(font)
    return y


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, ink: Colour) -> None:
    """An arrow to the right, `_ARROW` pixels long, that begins at (x, y)."""
    end, head = x + _ARROW, _ARROW // 3
    draw.line((x, y, end - 1, y), fill=ink, width=2)
    draw.polygon((end, y, end - head - 1, y - head, end - head - 1, y + head), fill=ink)


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | None, box: tuple[int, int, int, int],
           theme: Theme) -> None:
    """Draw a picture, framed, into a box (left, top, width, height); one with transparency stands free."""
    x, y, width, height = box
    if image is None:
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=theme.empty)
        draw.line((x, y, x + width - 1, y + height - 1), fill=theme.paper, width=2)
        return
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    free = image.mode == "RGBA"
    shown = image.convert("RGBA" if free else "RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(shown, (x + (width - size[0]) // 2, y + (height - size[1]) // 2), shown if free else None)
    if not free:
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=theme.empty)
