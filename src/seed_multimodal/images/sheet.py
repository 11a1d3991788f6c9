"""Contact sheets: rows of captioned images on one page; codes as strips of colours; boxes.

Every text is wrapped to the width it has, and heights are measured before anything is drawn, so nothing overlaps.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER, EMPTY = (24, 24, 28), (110, 110, 118), (255, 255, 255), (238, 238, 240)
UNKNOWN = (128, 128, 136, 90)  # a code that is not used, or not known yet
_MARGIN, _GAP, _LINE, _ARROW = 16, 10, 4, 14
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass
class Cell:
    """One image (None leaves an empty box) and the texts under it: first `asked`, then `caption`, in grey. `wide`: so
    many cells; `arrow`: it comes from the cell before it."""

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
    """Rows for lines (label, cells) that stand above each other: the first `columns` cells of each line, then the
    next."""
    longest = max(len(cells) for _, cells in lines)
    return [Row(label, list(cells[start:start + columns])) for start in range(0, longest, columns)
            for label, cells in lines if cells[start:start + columns]]


def contact_sheet(rows: Sequence[Row], title: str = "", cell: int = 128, columns: int = 10, max_lines: int = 10
                  ) -> Image.Image:
    """Lay out `rows` on an RGB page, as large as its contents need.

    Args:
        cell: width and height of an image's box in pixels; images keep their shape inside it.
        columns: most cells in a line; a longer row is broken.
        max_lines: captions and labels are cut after so many lines (shown by "…").
    """
    text, bold = ImageFont.load_default(size=max(11, cell // 10)), ImageFont.load_default(size=max(15, cell // 7))
    gap = _GAP + (_ARROW if any(item.arrow for row in rows for item in row.cells) else 0)
    label_width = max(cell, 110) if any(row.label for row in rows) else 0
    left = _MARGIN + (label_width + _GAP if label_width else 0)
    lines = [(label, chunk) for row in rows for label, chunk in _lines(row, columns)]
    most = max((sum(item.wide for item in chunk) for _, chunk in lines), default=1)
    page_width = max(left + most * (cell + gap) - gap + _MARGIN, 360)

    # Everything is laid out on the first, empty page, which only measures, then drawn on the second.
    height = 1
    for _ in range(2):
        sheet = Image.new("RGB", (page_width, height), PAPER)
        draw = ImageDraw.Draw(sheet)
        top = _MARGIN
        if title:
            top = _write(draw, wrap(title, bold, page_width - 2 * _MARGIN), _MARGIN, top, bold, INK) + _GAP
        for label, chunk in lines:
            heading, _, rest = label.rpartition("\n")
            below = _write(draw, wrap(heading, bold, label_width), _MARGIN, top, bold, INK)
            ends = [_write(draw, _cut(wrap(rest, text, label_width), max_lines), _MARGIN, below, text,
                           FAINT if heading else INK)]
            x = left
            for item in chunk:
                width = item.wide * (cell + gap) - gap
                _place(sheet, draw, item.image, (x, top, width, cell))
                if item.arrow:
                    _arrow(draw, x - (gap + _ARROW) // 2, top + cell // 2)
                below = top + cell
                for words, ink in ((item.asked, INK), (item.caption, FAINT)):
                    below = _write(draw, _cut(wrap(words, text, width), max_lines), x, below, text, ink)
                ends.append(below)
                x += width + gap
            top = max(ends) + _GAP
        height = top - (_GAP if lines else 0) + _MARGIN
    return sheet


def _lines(row: Row, columns: int) -> Iterator[tuple[str, list[Cell]]]:
    """A row as printed lines of at most `columns` cells; the label stands at the first."""
    label, chunk = row.label, list[Cell]()
    for item in row.cells:
        if chunk and sum(one.wide for one in chunk) + item.wide > columns:
            yield label, chunk
            label, chunk = "", []
        chunk.append(item)
    yield label, chunk


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break `text` into lines at most `width` pixels wide; words that are longer alone are broken too."""
    lines: list[str] = []
    for paragraph in text.strip().split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while font.getlength(word) > width and len(word) > 1:
                fits = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines if text.strip() else []


def _cut(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-1].rstrip() + "…"]


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, font: Font, ink: tuple[int, int, int]) -> int:
    """Write lines; returns where the next one would begin."""
    for line in lines:
        draw.text((x, y + _LINE), line, font=font, fill=ink)
        y += int(font.getbbox("Ågjpy|")[3]) + _LINE
    return y


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """An arrow to the right, `_ARROW` pixels long, that begins at (x, y)."""
    end, head = x + _ARROW, _ARROW // 3
    draw.line((x, y, end - 1, y), fill=FAINT, width=2)
    draw.polygon((end, y, end - head - 1, y - head, end - head - 1, y + head), fill=FAINT)


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | None, box: tuple[int, int, int, int]
           ) -> None:
    """Draw an image, framed, into a box (left, top, width, height); one with transparency has no frame."""
    x, y, width, height = box
    frame = (x, y, x + width - 1, y + height - 1)
    if image is None:
        draw.rectangle(frame, fill=EMPTY)
        draw.line(frame, fill=PAPER, width=2)
        return
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    is_free = image.mode == "RGBA"
    resized = image.convert("RGBA" if is_free else "RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(resized, (x + (width - size[0]) // 2, y + (height - size[1]) // 2), resized if is_free else None)
    if not is_free:
        draw.rectangle(frame, outline=EMPTY)


def code_colour(code: int, section: int) -> tuple[int, int, int]:
    """The colour of a code by its number within its section of the codebook (`section` codes; all, if it has none)."""
    number = code % section
    red, green, blue = colorsys.hls_to_rgb(number * 0.61803398875 % 1, (0.48, 0.62, 0.76)[number % 3], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def code_strip(codes: Sequence[int], section: int, *, first: int | None = None, columns: int = 32, cell: int = 12,
               gap: int = 2) -> Image.Image:
    """One image's codes as coloured cells, RGBA, `columns` a line; codes after the `first` ones are faint."""
    rows, step = -(-len(codes) // columns), cell + gap
    strip = Image.new("RGBA", (min(columns, len(codes)) * step - gap, rows * step - gap))
    draw = ImageDraw.Draw(strip)
    for place, code in enumerate(codes):
        x, y = place % columns * step, place // columns * step
        is_known = first is None or place < first
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=code_colour(code, section) if is_known else UNKNOWN)
    return strip


def above_strip(image: Image.Image, strip: Image.Image, gap: int = 6) -> Image.Image:
    """An image, resized to the strip's width, above the strip; RGBA."""
    height = max(1, round(strip.width * image.height / image.width))
    page = Image.new("RGBA", (strip.width, height + gap + strip.height))
    page.paste(image.convert("RGB").resize((strip.width, height), Image.Resampling.BICUBIC))
    page.paste(strip, (0, height + gap))
    return page


def draw_boxes(image: Image.Image, boxes: Iterable[Sequence[int]], colour: tuple[int, int, int] = (0, 255, 0),
               width: int = 2) -> Image.Image:
    """A copy with rectangles (left, top, right, bottom in pixels), green and two pixels wide as in the original."""
    copy = image.convert("RGB").copy()
    draw = ImageDraw.Draw(copy)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    return copy
