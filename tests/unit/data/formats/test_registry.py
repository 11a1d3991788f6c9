"""Formats of other packages, found by their entry points."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
MODULE = """
import numpy as np
from seed_multimodal.data.formats.record import Record

class Squares:
    def __init__(self, path, number):
        self.path, self.sizes, self.pair_keys = path or "squares", [number], {"caption_key": "name"}
    def locate(self, row):
        image = lambda: np.full((8, 8, 3), row, np.uint8)
        return Record(str(row), f"{self.path}: {row}", {"image": image, "name": f"square {row}"}, file=str(self.path))

def open_squares(path=None, number=4):
    return Squares(path, number)
"""
PROGRAM = """
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.records import open_records
records = open_records(None, format="squares", options={"number": 3})
print(len(records), records.read(2).fields["name"])
pair = open_pairs({"format": "squares", "files": "mine"}).read(1)
print(pair.captions, pair.image().mean(), pair.name)
open_pairs({"format": "squares", "numbr": 3})
"""


@pytest.mark.process
def test_open_registered_from_another_package(tmp_path: Path) -> None:
    (tmp_path / "squares.py").write_text(MODULE)
    info = tmp_path / "squares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: squares\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seed_multimodal.formats]\nsquares = squares:open_squares\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"})
    assert done.stdout.splitlines() == ["3 square 2", "['square 1'] 1.0 mine: 1"], done.stderr
    assert "unknown key 'numbr' (did you mean 'number'?)" in done.stderr
