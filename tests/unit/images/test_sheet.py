"""Contact sheets: everything given is on the page, nothing lies over anything else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from seed_multimodal.images.sheet import FAINT, PAPER, Cell, Row, contact_sheet, draw_boxes, wrap

RED, GREEN = (255, 0, 0), (0, 200, 0)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_contact_sheet_keeps_images_free_of_text() -> None:
    rows = [Row("a long label " * 8, [Cell(Image.new("RGB", (64, 64), RED), "caption " * 12),
                                      Cell(Image.new("RGB", (200, 50), GREEN), "wide")]),
            Row("next", [Cell(Image.new("RGB", (64, 64), RED), "x" * 200)])]
    sheet = contact_sheet(rows, "title " * 30, cell=100)
    edge = 2 * (100 + 100) - 4  # a thin frame is drawn on a picture that fills its box
    assert count(sheet, RED) == 2 * 100 * 100 - 2 * edge
    assert count(sheet, GREEN) == 100 * 25 - 2 * 25  # the frame crosses its two short ends


def test_contact_sheet_with_wide_cells_headings_and_arrows() -> None:
    free = Image.new("RGBA", (40, 10))
    free.paste((*GREEN, 255), (0, 0, 20, 10))
    rows = [Row("Head\nand the rest", [Cell(Image.new("RGB", (8, 8), RED)), Cell(free, "free", "asked", wide=2)])]
    plain = contact_sheet(rows, cell=120)
    assert count(plain, GREEN) > 0.4 * 250 * 62 and count(plain, PAPER) > 0.5 * plain.width * plain.height
    arrows = contact_sheet([*rows, Row("", [Cell(free), Cell(free, arrow=True)])], cell=120)
    assert count(arrows, FAINT) > 30 and arrows.width == plain.width + 28  # room for arrows in both gaps
    broken = contact_sheet([Row("", [Cell(free, wide=2)] * 3)], cell=120, columns=5)
    assert broken.height > 2 * 120


def test_contact_sheet_breaks_long_rows() -> None:
    many = contact_sheet([Row("", [Cell(Image.new("RGB", (8, 8), RED)) for _ in range(25)])], cell=40, columns=10)
    assert many.width < 10 * 50 + 60 and many.height > 3 * 40
    assert count(contact_sheet([Row("r", [Cell(None, "refused")])], cell=64), (238, 238, 240)) > 3000


def test_contact_sheet_without_rows_has_its_title() -> None:
    sheet = contact_sheet([], "nothing to show")
    assert sheet.width >= 300 and np.asarray(sheet).min() < 100


@pytest.mark.parametrize("text", ["one two three four five six", "supercalifragilisticexpialidocious", "a\nb\n\nc", ""])
def test_wrap_loses_nothing(text: str) -> None:
    font = ImageFont.load_default(size=12)
    lines = wrap(text, font, 60)
    assert all(font.getlength(line) <= 60 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_contact_sheet_cuts_captions() -> None:
    short = contact_sheet([Row("", [Cell(Image.new("RGB", (8, 8)), "word " * 300)])], cell=80, max_lines=3)
    assert short.height < 80 + 6 * 20


def test_draw_boxes_leaves_its_image() -> None:
    image = Image.new("RGB", (20, 20))
    drawn = draw_boxes(image, [(2, 3, 10, 12)])
    assert drawn.getpixel((2, 3)) == drawn.getpixel((10, 12)) == (0, 255, 0) and drawn.getpixel((6, 7)) == (0, 0, 0)
    assert image.getpixel((2, 3)) == (0, 0, 0)
