"""The shipped nano-lavit does on unseen scenes what LaVIT is for; figures of many scenes are in its report."""

import json
from pathlib import Path

import pytest

from seed_nano.report.__main__ import main as report

ROOT = Path(__file__).resolve().parents[3]
MODEL, JUDGE = ROOT / "pretrained" / "nano-lavit", ROOT / "pretrained" / "nano" / "judge"


@pytest.mark.timeout(300)
def test_it_reads_and_writes_as_many_words_as_there_is_to_see(tmp_path: Path) -> None:
    assert report(["--model", str(MODEL), "--judge", str(JUDGE), "--out", str(tmp_path), "--limit", "20",
                   "--splits", "val"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["splits"]["val"]
    tokens = found["tokens"]
    assert tokens["cosine"]["value"] < 0.2 < tokens["blind"]["value"]
    assert tokens["empty_share"]["value"] <= 0.5
    for section, least in {"caption": 0.85, "drawing": 0.7, "wide_drawing": 0.6}.items():  # by chance below 0.001
        assert found[section]["all"]["value"] >= least, section
    assert (tmp_path / "kept.webp").is_file()
