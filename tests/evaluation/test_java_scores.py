"""METEOR and SPICE: where Java and their package are, and what is told where they are not."""

from __future__ import annotations

import shutil
import sys

import pytest

from seed_multimodal.evaluation.java_scores import java_scores

SAID = {1: "a red fox in the snow", 2: "two cats on a sofa", 3: ""}
TRUE = {1: ["a fox stands in snow", "A red fox, in the snow!"], 2: ["two cats lie on a couch"], 3: ["a dog"]}


@pytest.mark.process
def test_meteor_by_its_java_program():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    scores, notes = java_scores(SAID, TRUE)
    same, _ = java_scores({1: "a red fox in the snow"}, TRUE)
    assert 0 < scores["METEOR"] < same["METEOR"] == pytest.approx(1, abs=0.01) and len(notes) <= 1


@pytest.fixture
def imported_anew():
    """The package is imported from wherever it is first; afterwards what was imported before is there again."""
    def take() -> dict:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "pycocoevalcap"}

    before = take()
    yield
    take()
    sys.modules.update(before)


def test_the_parser_of_spice_is_not_downloaded_while_downloads_are_off(tmp_path, monkeypatch, imported_anew):
    package = tmp_path / "pycocoevalcap"
    for part, kind in (("meteor", "Meteor"), ("spice", "Spice")):  # laid out as the package; started, it would download
        (package / part).mkdir(parents=True)
        (package / part / f"{part}.py").write_text(
            f"class {kind}:\n    def __init__(self):\n        open({str(tmp_path / part)!r}, 'w')\n"
            "    def compute_score(self, wanted, made):\n        return 0.5, []\n")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    scores, notes = java_scores(SAID, TRUE)
    assert scores == {"METEOR": 0.5} and not (tmp_path / "spice").exists()
    assert len(notes) == 1 and "stanford-corenlp-3.6.0.jar is not there, and downloads are off" in notes[0]
    (package / "spice" / "lib").mkdir()
    (package / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    assert java_scores(SAID, TRUE) == ({"METEOR": 0.5, "SPICE": 0.5}, [])


def test_what_they_need_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    scores, notes = java_scores(SAID, TRUE)
    assert not scores and [note.split(" (")[0] for note in notes] == ["METEOR is not computed", "SPICE is not computed"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert java_scores(SAID, TRUE)[1][0].startswith("METEOR and SPICE are not computed: they need Java")
