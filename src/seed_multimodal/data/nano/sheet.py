"""A contact sheet of a built nano set: some pictures of every split and style, with their labels."""

from __future__ import annotations

from PIL import Image

from seed_multimodal.data.nano.families import SPLITS, draw
from seed_multimodal.data.nano.load import NanoSet
from seed_multimodal.images.sheet import Cell, Row, contact_sheet


def nano_sheet(nano: NanoSet, per_row: int = 10, cell: int = 96) -> Image.Image:
    """Rows are split x style; pictures are chosen by a hash of their key, so the sheet is always the same."""
    images = nano.images()
    rows = []
    for split in SPLITS:
        for style in dict.fromkeys(record.style for record in nano.records):
            chosen = [i for i in nano.split(split) if nano.records[i].style == style]
            chosen.sort(key=lambda i: draw("sheet", nano.records[i].key))
            cells = [Cell(Image.fromarray(images[i]), nano.records[i].label) for i in chosen[:per_row]]
            rows.append(Row(f"{split}\n{style}\n{len(chosen)} pictures", cells))
    return contact_sheet(rows, title=f"nano data set, {len(nano)} pictures, {nano.size} px", cell=cell, columns=per_row)
