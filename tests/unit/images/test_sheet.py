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
    rows = [
        Row(
            "a long label " * 8,
            [
                Cell(Image.new("RGB", (64, 64), RED), "caption " * 12, "asked " * 9),
                Cell(Image.new("RGB", (200, 50), GREEN), "wide"),
            ],
        ),
        Row("next", [Cell(Image.new("RGB", (64, 64), RED), "x" * 200), Cell(None, "no image")]),
    ]
    sheet = contact_sheet(rows, "title " * 30, cell=100)
    edge = 2 * (100 + 100) - 4  # a thin frame is drawn on an image that fills its box
    assert count(sheet, RED) == 2 * 100 * 100 - 2 * edge
    assert count(sheet, GREEN) == 100 * 25 - 2 * 25  # the frame crosses its two short ends


def test_contact_sheet_breaks_long_rows_and_cuts_captions():
    many = contact_sheet(
        [Row("", [Cell(Image.new("RGB", (8, 8), RED)) for _ in range(25)])], cell=40, columns=10
    )
    assert many.width < 10 * 50 + 60 and many.height > 3 * 40
    short = contact_sheet(
        [Row("", [Cell(Image.new("RGB", (8, 8)), "word " * 300)])], cell=80, max_lines=3
    )
    assert short.height < 80 + 6 * 20
    assert count(contact_sheet([], "nothing to show"), INK) > 20


def test_code_strip_has_a_colour_for_each_code_of_a_section():
    strip = code_strip([0, 1, 4, 5, 2], 4, columns=4, cell=6, gap=1)
    assert strip.size == (27, 13)
    colours = [strip.getpixel((7 * column, 0)) for column in range(4)]
    assert colours[0] == colours[2] != colours[1] == colours[3] != strip.getpixel((0, 7))


def test_draw_boxes_on_a_copy():
    image = Image.new("RGB", (20, 20))
    framed = draw_boxes(image, [(2, 3, 10, 12)])
    assert framed.getpixel((2, 3)) == framed.getpixel((10, 12)) == (0, 255, 0) and framed.getpixel(
        (6, 7)
    ) == (0, 0, 0)
    assert image.getpixel((2, 3)) == (0, 0, 0)
