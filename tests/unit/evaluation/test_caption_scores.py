"""Caption scores equal those of pycocoevalcap, with and without Java."""

import shutil

import pytest

from seed_multimodal.evaluation.captions import caption_scores

pytest.importorskip("pycocoevalcap")
CAPTIONS = ["A man rides a horse on the beach.", "two dogs play", "a bowl of soup and a spoon", ""]
REFERENCES = [
    ["a man is riding a horse on a beach", "A man rides a brown horse\u2028along the beach."],
    ["two dogs are playing in the snow", "dogs playing", "two brown dogs play with a ball"],
    ["a bowl of soup", "soup in a bowl next to a spoon"],
    ["a red bus", "the bus in the street"],
]
# Of pycocoevalcap 1.2 (its PTBTokenizer, Bleu(4), Rouge, Cider) on these captions, in whose words
# both tokenizers agree.
RECORDED = {
    "Bleu_1": 0.756251991559624,
    "Bleu_2": 0.6960225603229276,
    "Bleu_3": 0.5447223175843202,
    "Bleu_4": 0.4118136873107139,
    "ROUGE_L": 0.5521604394240777,
    "CIDEr": 2.347696522587433,
}


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
