"""Contact sheets, strips of codes, and boxes: layout and colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from seed_multimodal.images.sheet import INK, Cell, Row, code_strip, contact_sheet, draw_boxes

RED = (255, 0, 0)
GREEN = (0, 200, 0)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_contact_sheet_keeps_images_free_of_text():
    # Long labels and captions are wrapped or cut, never drawn over an image.
    red = Image.new("RGB", (64, 64), RED)
    wide = Image.new("RGB", (200, 50), GREEN)
    long = [Cell(red, "caption " * 12, "asked " * 9), Cell(wide, "wide")]
    rows = [
        Row("a long label " * 8, long),
        Row("next", [Cell(red, "x" * 200), Cell(None, "no image")]),
    ]
    sheet = contact_sheet(rows, "title " * 30, cell=100)
    # A thin frame is drawn on an image that fills its box, and across a wide one's short ends.
    assert count(sheet, RED) == 2 * (100 * 100 - 4 * 99)
    assert count(sheet, GREEN) == 100 * 25 - 2 * 25


def test_contact_sheet_breaks_long_rows_and_cuts_captions():
    cells = [Cell(Image.new("RGB", (8, 8), RED)) for _ in range(25)]
    many = contact_sheet([Row("", cells)], cell=40, columns=10)
    assert many.width < 10 * 50 + 60 and many.height > 3 * 40
    caption = [Cell(Image.new("RGB", (8, 8)), "word " * 300)]
    assert contact_sheet([Row("", caption)], cell=80, max_lines=3).height < 80 + 6 * 20
    assert count(contact_sheet([], "nothing to show"), INK) > 20


def test_code_strip_has_a_colour_for_each_code_of_a_section():
    # Equal codes have equal colours, so that strips can be compared.
    strip = code_strip([0, 1, 4, 5, 2], 4, columns=4, cell=6, gap=1)
    assert strip.size == (27, 13)
    colours = [strip.getpixel((7 * column, 0)) for column in range(4)]
    assert colours[:2] == colours[2:]
    assert len({*colours, strip.getpixel((0, 7))}) == 3


def test_draw_boxes_on_a_copy():
    image = Image.new("RGB", (20, 20))
    framed = draw_boxes(image, [(2, 3, 10, 12)])
    assert framed.getpixel((2, 3)) == framed.getpixel((10, 12)) == (0, 255, 0)
    assert framed.getpixel((6, 7)) == image.getpixel((2, 3)) == (0, 0, 0)
