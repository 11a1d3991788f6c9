"""Contact sheets: rows of captioned images on one page; boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

# Colours, and distances in pixels.
INK = (24, 24, 28)
PAPER = (255, 255, 255)
FRAME = (226, 226, 230)
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

    # 1. Rows with more cells than columns are broken into lines; the first one has the label.
    lines: list[Row] = []
    for row in rows:
        lines.append(Row(row.label, row.cells[:columns]))
        for start in range(columns, len(row.cells), columns):
            lines.append(Row("", row.cells[start : start + columns]))

    # 2. The width of the page.
    label_width = 0
    if any(row.label for row in rows):
        label_width = max(cell, _MIN_LABEL_WIDTH) + _GAP
    n_columns = max((len(line.cells) for line in lines), default=1)
    width = max(label_width + n_columns * (cell + _GAP), _MIN_WIDTH)

    # 3. The title and the lines, each as an image of that width.
    parts: list[Image.Image] = []
    if title:
        parts.append(_text_image(title, large, width, max_lines))
    for line in lines:
        blocks = []
        if label_width:
            label_image = _text_image(line.label, small, label_width - _GAP, max_lines)
            blocks.append((label_image, 0))
        for column, item in enumerate(line.cells):
            left = label_width + column * (cell + _GAP)
            blocks.append((_cell_image(item, small, cell, max_lines), left))
        parts.append(_paste_side_by_side(blocks, width))

    # 4. One below the other.
    height = sum(part.height + _GAP for part in parts)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), PAPER)
    top = _MARGIN
    for part in parts:
        sheet.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    return sheet


def _paste_side_by_side(blocks: Sequence[tuple[Image.Image, int]], width: int) -> Image.Image:
    """Images at their left edges on an image of this width."""
    height = max((block.height for block, _ in blocks), default=1)
    line = Image.new("RGB", (width, height), PAPER)
    for block, left in blocks:
        line.paste(block, (left, 0))
    return line


def _cell_image(item: Cell, font: Font, cell: int, max_lines: int) -> Image.Image:
    """A cell's image, framed, above its texts."""
    text = "\n".join(filter(None, (item.prompt, item.caption)))
    text_image = _text_image(text, font, cell, max_lines)
    block = Image.new("RGB", (cell, cell + text_image.height), PAPER)
    if item.image is not None:
        # Centred, its longer side as long as the box.
        scale = cell / max(item.image.size)
        width = max(1, round(item.image.width * scale))
        height = max(1, round(item.image.height * scale))
        resized = item.image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        block.paste(resized, ((cell - width) // 2, (cell - height) // 2))
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


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[int]],
    colour: tuple[int, int, int] = (0, 255, 0),
    width: int = 2,
) -> Image.Image:
    """A copy with rectangles, green and two pixels wide as in the original.

    boxes: left, top, right and bottom in pixels.
    """
    copy = image.convert("RGB").copy()
    draw = ImageDraw.Draw(copy)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    return copy
