"""Steps between log lines never wait for the device, and their numbers are the same."""

from __future__ import annotations

import json

import pytest
from no_waiting import guard_steps

from seed_multimodal.training.distributed import TrainingError

FAST = ["run.num_workers=0", "run.max_epoch=1", "run.iters_per_epoch=8"]
STAGE2 = ["model.load_pretrained=False", "model.restart_every=6"]
CLIP = ["model.clip_model=pretrained/nano/seed_tokenizer/diffusion_model/image_encoder", "model.clip_precision=fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, options", [
    ("stage1", []), ("stage1", ["model.freeze_vit=True"]),
    ("stage1", [*CLIP, "model.embedding_weight=1.0"]), ("stage2", [*STAGE2, *CLIP]),
    ("stage2", [*STAGE2, "model.ema_decay=0.9", "model.corrupt=0.1", "model.nested=0.2", "model.kmeans_start=True"]),
    ("stage2", [*STAGE2, "run.accum_grad_iters=2", "run.clip_grad=1.0", "run.ema=0.9"])])
def test_a_step_that_is_not_logged_waits_for_nothing(yaml, run, tmp_path, monkeypatch, stage, options):
    guarded = guard_steps(monkeypatch)
    run(yaml(stage, *FAST, *options, "run.log_freq=4"))
    accumulate = 2 if "run.accum_grad_iters=2" in options else 1
    last = 8 // accumulate
    # Step 0 is not guarded; the 4th and the last are logged, after the 6th codes are moved.
    assert guarded == [step for step in range(1, last)
                       if (step + 1) % 4 and not (stage == "stage2" and (step + 1) % 6 == 0)][:len(guarded)]
    assert len(guarded) >= 2


@pytest.mark.slow
def test_numbers_that_are_read_later_are_the_same(yaml, run, tmp_path):
    """Of a run that logs each step and one that logs every fourth: the smoothed loss, the codes' use, the weights."""
    lines = []
    for every in (1, 4):
        run(yaml("stage2", *FAST, *STAGE2, f"run.log_freq={every}", name=f"every-{every}"))
        log = (tmp_path / f"every-{every}" / "stage2.log.jsonl").read_text().splitlines()
        lines.append({line["step"]: line for line in map(json.loads, log)})
    assert sorted(lines[1]) == [4, 8]
    for step in (4, 8):
        for key in ("loss", "loss_embed", "grad", "last_loss"):
            assert lines[0][step][key] == lines[1][step][key]


def test_a_nan_between_log_lines_is_named_with_its_step(yaml, tmp_path, monkeypatch):
    import train
    from seed_lavis.models import Blip2CodebookAllImage

    forward, calls = Blip2CodebookAllImage.forward, []

    def spoiled(self, samples):
        calls.append(0)
        out = forward(self, samples)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 6 else out

    monkeypatch.setattr(Blip2CodebookAllImage, "forward", spoiled)
    runner = train.build(train.parser("").parse_args(yaml(
        "stage2", *FAST, "model.load_pretrained=False", "run.log_freq=50", "run.save_every_steps=4")))
    with pytest.raises(TrainingError, match=r"The loss became nan at step 6; .*checkpoint-4"):
        runner.train()
    saved = tmp_path / "stage2" / "stage2.checkpoints"
    assert [folder.name for folder in saved.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not list((tmp_path / "stage2").glob("checkpoint_*.pth"))
