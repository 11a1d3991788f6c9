"""Changed settings of a resumed run."""

from __future__ import annotations

from seed_multimodal.settings import changed_settings
from seed_multimodal.training.checkpoint import settings_remark

BEFORE = {
    "data": {"sources": [{"name": "a", "weight": 1}, {"name": "b", "weight": 2}]},
    "optim": {"rate": 1},
    "trainer": {"resume": "auto", "resumed": 0},
    **{f"k{index}": 0 for index in range(9)},
}


def test_changed_settings_lists_each_key():
    now = {
        **BEFORE,
        "data": {"sources": [{"name": "b", "weight": 3}]},
        "optim": {},
        "trainer": {"resume": "never", "resumed": 1},
    }
    assert changed_settings(BEFORE, BEFORE) == []
    assert changed_settings(BEFORE, now, ["trainer.resume", "optim"]) == [
        "data.sources.a.name: a -> not given",
        "data.sources.a.weight: 1 -> not given",
        "data.sources.b.weight: 2 -> 3",
        "trainer.resumed: 0 -> 1",
    ]


def test_settings_remark_counts_further_changes():
    assert settings_remark(BEFORE, BEFORE, ()) == ""
    remark = settings_remark(BEFORE, {**BEFORE, **{f"k{index}": 1 for index in range(9)}}, ())
    assert remark.startswith("settings changed since the checkpoint: k0: 0 -> 1; k1: 0 -> 1; ")
    assert remark.endswith("; k7: 0 -> 1; 1 more")
