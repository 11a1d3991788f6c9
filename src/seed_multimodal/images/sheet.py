"""Contact sheets: rows of captioned images on one page; codes as strips of colours; boxes."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FRAME = (24, 24, 28), (255, 255, 255), (226, 226, 230)
_MARGIN, _GAP = 16, 10
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass
class Cell:
    """One image (None: empty box) and the texts under it: first `prompt`, then `caption`."""

    image: Image.Image | None = None
    caption: str = ""
    prompt: str = ""


@dataclass
class Row:
    """A label and its cells; cells beyond the sheet's `columns` continue in the next line."""

    label: str
    cells: list[Cell] = field(default_factory=list)


def contact_sheet(
    rows: Sequence[Row], title: str = "", cell: int = 128, columns: int = 10, max_lines: int = 10
) -> Image.Image:
    """Lay out `rows` on an RGB page of the required size.

    Args:
        cell: width and height of an image's box in pixels; images keep their shape inside it.
        max_lines: captions and labels are truncated after this many lines (shown by "…").
    """
    small, large = (
        ImageFont.load_default(size=max(11, cell // 10)),
        ImageFont.load_default(size=max(15, cell // 7)),
    )
    lines = [
        Row("" if start else row.label, row.cells[start : start + columns])
        for row in rows
        for start in range(0, max(len(row.cells), 1), columns)
    ]
    label_width = max(cell, 110) + _GAP if any(row.label for row in rows) else 0
    most = max((len(line.cells) for line in lines), default=1)
    width = max(label_width + most * (cell + _GAP), 330)
    parts = [_written(title, large, width, max_lines)] if title else []
    for line in lines:
        places = (
            [(_written(line.label, small, max(cell, 110), max_lines), 0)] if label_width else []
        )
        places += [
            (_drawn(item, small, cell, max_lines), label_width + number * (cell + _GAP))
            for number, item in enumerate(line.cells)
        ]
        part = Image.new(
            "RGB", (width, max((block.height for block, _ in places), default=1)), PAPER
        )
        for block, left in places:
            part.paste(block, (left, 0))
        parts.append(part)
    sheet = Image.new(
        "RGB", (width + 2 * _MARGIN, sum(part.height + _GAP for part in parts) + 2 * _MARGIN), PAPER
    )
    top = _MARGIN
    for part in parts:
        sheet.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    return sheet


def _drawn(item: Cell, font: Font, cell: int, max_lines: int) -> Image.Image:
    """A cell's image, framed, above its texts."""
    texts = _written("\n".join(filter(None, (item.prompt, item.caption))), font, cell, max_lines)
    block = Image.new("RGB", (cell, cell + texts.height), PAPER)
    if item.image is not None:
        scale = cell / max(item.image.size)
        width, height = (max(1, round(side * scale)) for side in item.image.size)
        resized = item.image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        block.paste(resized, ((cell - width) // 2, (cell - height) // 2))
    ImageDraw.Draw(block).rectangle((0, 0, cell - 1, cell - 1), outline=FRAME)
    block.paste(texts, (0, cell))
    return block


def _written(text: str, font: Font, width: int, max_lines: int) -> Image.Image:
    """A text of this width, wrapped by the mean letter width."""
    letters, height = max(1, int(width / font.getlength("n"))), int(font.getbbox("Ågjpy|")[3]) + 4
    lines = [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, letters)]
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = ["…"]
    page = Image.new("RGB", (width, max(1, height * len(lines))), PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((0, 4 + number * height), line, font=font, fill=INK)
    return page


def code_strip(
    codes: Sequence[int], section: int, *, columns: int = 8, cell: int = 12, gap: int = 2
) -> Image.Image:
    """One image's codes as coloured cells, `columns` per line, coloured by their index within a codebook section
    (`section` codes; all, if it has none)."""
    rows, step = -(-len(codes) // columns), cell + gap
    strip = Image.new("RGB", (min(columns, len(codes)) * step - gap, rows * step - gap), PAPER)
    draw = ImageDraw.Draw(strip)
    for place, code in enumerate(codes):
        x, y, number = place % columns * step, place // columns * step, code % section
        rgb = colorsys.hls_to_rgb(number * 0.61803398875 % 1, (0.48, 0.62, 0.76)[number % 3], 0.65)
        draw.rectangle(
            (x, y, x + cell - 1, y + cell - 1), fill=tuple(round(255 * part) for part in rgb)
        )
    return strip


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[int]],
    colour: tuple[int, int, int] = (0, 255, 0),
    width: int = 2,
) -> Image.Image:
    """A copy with rectangles (left, top, right, bottom in pixels), green and two pixels wide as in the original."""
    copy = image.convert("RGB").copy()
    draw = ImageDraw.Draw(copy)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    return copy
