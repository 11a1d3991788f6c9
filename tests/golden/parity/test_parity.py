"""Batches and losses are those recorded before the library was consolidated (`recorded.json`, written by `record.py`).

What is drawn is compared bit for bit everywhere, pixels and losses where processor and torch are those of the record;
elsewhere losses within 3e-4, in bf16 within 3e-3, by which other machines' rounding differs after 30 steps of such
small models (1.3e-3 in bf16 between an Intel Xeon and an AMD EPYC).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())
SAME_MACHINE = RECORDED["environment"] == cases.environment()
pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def marked(all_cases: Iterable[str]) -> list[Any]:
    """The cases as parameters; those with data workers or several processes are marked."""
    return [pytest.param(case, marks=[pytest.mark.process] * ("workers" in case or "processes" in case))
            for case in all_cases]


@pytest.mark.parametrize("case", marked(cases.PAIRS))
def test_pairs(case: str, tmp_path: Path) -> None:
    expected, found = RECORDED["pairs"][case], cases.pair_digests(case, tmp_path)
    assert found["drawn"] == expected["drawn"]
    if SAME_MACHINE and not case.startswith("nano"):  # of which the captions are kept, not the pictures
        assert found["pixels"] == expected["pixels"]


@pytest.mark.parametrize("case", marked(cases.ROWS))
def test_rows(case: str, tmp_path: Path) -> None:
    assert cases.row_digests(case, tmp_path) == RECORDED["rows"][case]


def test_workers_change_nothing() -> None:
    for group, case in (("pairs", "tar, 1 process"), ("rows", "packed, 1 process")):
        assert RECORDED[group][case] == RECORDED[group][f"{case}, 2 workers"]


@pytest.mark.slow
@pytest.mark.parametrize("case", marked(cases.LOSSES))
def test_losses(case: str, tmp_path: Path) -> None:
    if "tokenizer" in case:
        try:
            importlib.metadata.version("salesforce-lavis")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("salesforce-lavis is not installed: bash install.sh --lavis")
    if "ZeRO" in case and (importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None):
        pytest.skip("DeepSpeed on a CPU needs the package and g++")
    expected, found = RECORDED["losses"][case], cases.LOSSES[case](tmp_path)
    stages = found if isinstance(found, dict) else {"": found}
    for stage, losses in stages.items():
        recorded = expected[stage] if stage else expected
        assert len(losses) == cases.STEPS
        near = pytest.approx(recorded, rel=3e-3 if "bf16" in case else 3e-4)
        assert losses == (recorded if SAME_MACHINE else near), f"{case} {stage}"
