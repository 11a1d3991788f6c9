"""Stage 2 as two processes: whatever moves codes moves them alike everywhere."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lavis_runs import torchrun


@pytest.mark.process
def test_codebooks_stay_equal(yaml, start, tmp_path):
    _, (first, second) = torchrun(start, tmp_path, yaml(
        "stage2", "model.load_pretrained=False", "model.codebook_warmup=2", "model.restart_every=2", "run.max_epoch=1",
        "run.iters_per_epoch=6", "run.num_workers=0"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    lines = [json.loads(line) for line in (tmp_path / "stage2" / "stage2.log.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(math.isfinite(line["last_loss"]) for line in lines)
    assert "perplexity" not in lines[1] and all(0 < line["codebook_used"] <= 1 for line in lines[2:])
    assert lines[2]["loss_embed"] < lines[1]["last_loss"]
