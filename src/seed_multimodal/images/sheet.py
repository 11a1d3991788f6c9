"""Contact sheets: rows of captioned images on one page; boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Colours, and distances in pixels.
INK = (24, 24, 28)
PAPER = (255, 255, 255)
FRAME = (226, 226, 230)
GREEN = (0, 255, 0)
_MARGIN = 16
_GAP = 10
_MIN_LABEL_WIDTH = 110
_MIN_WIDTH = 330
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
    small = ImageFont.load_default(size=max(11, cell // 10))
    large = ImageFont.load_default(size=max(15, cell // 7))

    # 1. The width of the page.
    label_width = 0
    if any(row.label for row in rows):
        label_width = max(cell, _MIN_LABEL_WIDTH) + _GAP
    n_columns = min(columns, max((len(row.cells) for row in rows), default=1))
    width = max(label_width + n_columns * (cell + _GAP), _MIN_WIDTH)

    # 2. Images at their left edges, line by line: the title, then each row, whose cells continue in
    #    further lines.
    lines: list[list[tuple[int, Image.Image]]] = []
    if title:
        lines.append([(0, _text_image(title, large, width, max_lines))])
    for row in rows:
        label = _text_image(row.label, small, max(cell, _MIN_LABEL_WIDTH), max_lines)
        for start in range(0, max(1, len(row.cells)), columns):
            line = [] if start or not row.label else [(0, label)]
            for column, item in enumerate(row.cells[start : start + columns]):
                left = label_width + column * (cell + _GAP)
                line.append((left, _cell_image(item, small, cell, max_lines)))
            lines.append(line)

    # 3. One line below the other.
    heights = [max((image.height for _, image in line), default=1) + _GAP for line in lines]
    sheet = Image.new("RGB", (width + 2 * _MARGIN, sum(heights) + 2 * _MARGIN), PAPER)
    top = _MARGIN
    for line, height in zip(lines, heights, strict=True):
        for left, image in line:
            sheet.paste(image, (_MARGIN + left, top))
        top += height
    return sheet


def _cell_image(item: Cell, font: Font, cell: int, max_lines: int) -> Image.Image:
    """A cell's image, framed, above its texts."""
    text = "\n".join(filter(None, (item.prompt, item.caption)))
    text_image = _text_image(text, font, cell, max_lines)
    block = Image.new("RGB", (cell, cell + text_image.height), PAPER)
    if item.image is not None:
        # Centred, its longer side as long as the box.
        image = item.image.convert("RGB")
        block.paste(ImageOps.pad(image, (cell, cell), Image.Resampling.BICUBIC, PAPER))
    ImageDraw.Draw(block).rectangle((0, 0, cell - 1, cell - 1), outline=FRAME)
    block.paste(text_image, (0, cell))
    return block


def _text_image(text: str, font: Font, width: int, max_lines: int) -> Image.Image:
    """A text of this width, wrapped by the mean letter width."""
    # How many letters fit into a line; 4 pixels between lines.
    letters = max(1, int(width / font.getlength("n")))
    line_height = int(font.getbbox("Ågjpy|")[3]) + 4
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, letters)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = ["…"]
    page = Image.new("RGB", (width, max(1, line_height * len(lines))), PAPER)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(lines):
        draw.text((0, 4 + index * line_height), line, font=font, fill=INK)
    return page


def draw_boxes(image: Image.Image, boxes: Iterable[Sequence[int]], width: int = 2) -> Image.Image:
    """A copy with rectangles, green and two pixels wide as in the original.

    boxes: left, top, right and bottom in pixels.
    """
    copy = image.convert("RGB").copy()
    draw = ImageDraw.Draw(copy)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=GREEN, width=width)
    return copy
