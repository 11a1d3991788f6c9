"""Contact sheets, strips of codes, and boxes: layout and colours."""

import numpy as np
from PIL import Image

from seed_multimodal.images.sheet import Cell, Row, contact_sheet, draw_boxes

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


def test_draw_boxes_on_a_copy():
    image = Image.new("RGB", (20, 20))
    framed = draw_boxes(image, [(2, 3, 10, 12)])
    assert framed.getpixel((2, 3)) == framed.getpixel((10, 12)) == (0, 255, 0)
    assert framed.getpixel((6, 7)) == image.getpixel((2, 3)) == (0, 0, 0)
