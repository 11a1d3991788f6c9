"""Caption scores equal those of pycocoevalcap, with and without Java."""

import shutil

import pytest
from yaml_tables import read_tables

from seed_multimodal.evaluation.captions import caption_scores

pytest.importorskip("pycocoevalcap")
TABLES = read_tables(__file__)
CAPTIONS, REFERENCES = TABLES["captions"], TABLES["references"]
RECORDED = TABLES["recorded"]


def test_caption_scores_without_java(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    scores, notes = caption_scores(CAPTIONS, REFERENCES)
    assert scores == pytest.approx(RECORDED, abs=1e-9)
    assert len(notes) == 1
    assert "METEOR and SPICE" in notes[0]
    assert capsys.readouterr().out == ""  # stdout is for the summary
    # It compares an image with the others.
    scores, notes = caption_scores(["a fox"], [["a fox"]])
    assert scores["ROUGE_L"] == 1 and "CIDEr" not in scores
    assert "CIDEr" in notes[0]


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_caption_scores_with_java():
    scores, notes = caption_scores(CAPTIONS, REFERENCES)
    assert {name: scores[name] for name in RECORDED} == pytest.approx(RECORDED, abs=1e-9)
    assert 0 < scores["METEOR"] < 1
    # SPICE needs a download, which the note names.
    assert ("SPICE" in scores) is (notes == [])
    assert all("SPICE" in note for note in notes)
