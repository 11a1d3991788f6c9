"""Achieved FLOP/s and their share of the peak: counted against torch's own counter, and in what a run says."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CLIP = "model.clip_model=pretrained/nano/seed_tokenizer/diffusion_model/image_encoder"


@pytest.mark.parametrize("stage, options", [
    ("stage1", ["model.max_txt_len=8"]), ("stage1", ["model.freeze_vit=True"]),
    ("stage1", [CLIP, "model.clip_precision=fp32", "model.embedding_weight=1.0"]),
    ("stage2", ["model.load_pretrained=False"]),
    ("stage2", ["model.load_pretrained=False", "model.freeze_qformer=False", "model.use_qformer_image=True"])])
def test_a_picture_costs_what_torch_counts(yaml, stage, options):
    import train
    from seed_lavis.cost import step_flops

    runner = train.build(train.parser("").parse_args(yaml(stage, *options)))
    model, pairs = runner._model, 4
    samples = {"image": torch.randn(pairs, 3, 64, 64), "caption": ["a red fox that runs over a wide green field"] * 4}
    # Fused attention computes its scores again on the way back, which is no part of the model.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(samples)["loss"].backward()
    # A batch of short captions is padded to its longest.
    assert counter.get_total_flops() == pytest.approx(pairs * step_flops(model, pairs), rel=0.02)


def test_a_run_says_how_fast_it_was(yaml, run, tmp_path, capsys):
    from seed_lavis.cost import sample_cost

    runner = run(yaml("stage2", "model.load_pretrained=False", "run.peak_tflops=0.05", "run.tensorboard=True"))
    said = capsys.readouterr().out.splitlines()
    assert sum(" TFLOP/s (MFU " in line and "samples/s" in line for line in said) == 8
    (summary,) = [line for line in said if line.startswith("Stage 2 (codebook): 8 steps")]
    assert " TFLOP/s (MFU " in summary
    for line in map(json.loads, (tmp_path / "stage2" / "stage2.log.jsonl").read_text().splitlines()):
        assert line["tflops"] == pytest.approx(line["samples_per_s"] * sample_cost(runner.run).flops / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.05)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "stage2" / "tensorboard" / "stage2"))
    events.Reload()
    assert {"tflops", "mfu"} <= set(events.Tags()["scalars"])


def test_without_a_known_peak_there_is_no_utilisation(yaml, run, tmp_path, capsys):
    run(yaml("stage1", "run.max_epoch=1", "run.device=cpu"))
    line = json.loads((tmp_path / "stage1" / "stage1.log.jsonl").read_text().splitlines()[-1])
    assert line["tflops"] > 0 and "mfu" not in line
    said = capsys.readouterr().out
    assert " TFLOP/s" in said and "MFU" not in said
