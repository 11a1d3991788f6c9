"""The model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from seed_multimodal.errors import DataError
from seed_multimodal.weights import save_state_dict
from seed_nano.report.card import write_card


@pytest.mark.process  # the card names the commit
def test_card_of_records_and_report(tmp_path: Path) -> None:
    work, model = tmp_path / "work", tmp_path / "model"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "part" / "model.safetensors")
    with pytest.raises(DataError, match="no stage has left a record"):
        write_card(model, work)
    (work / "stage2").mkdir(parents=True)
    (work / "vae.done.json").write_text(json.dumps({"stage": "vae", "steps": 4, "batch_size": 8, "seconds": 7.0,
                                                    "psnr": 20.5}))
    (work / "stage2" / "summary.json").write_text(json.dumps({"steps": 10, "seconds": 9.0, "checkpoint": "/x.pth"}))
    (model / "report").mkdir()
    (model / "report" / "report.md").write_text("# Report of toy\n\n## Aims\n\n![drawings.webp](drawings.webp)\n")
    card = ModelCard.load(write_card(model, work, "A toy."))
    assert card.data.license == "apache-2.0" and card.text.strip().startswith("# model")
    for line in ("| vae | 4 × 8 | 7 | psnr 20.5 |", "| stage2 | 10 × packed rows | 9 |  |", "| `part` | 12 | ",
                 "### Aims", "(report/drawings.webp)", "A toy."):
        assert line in card.text, line
