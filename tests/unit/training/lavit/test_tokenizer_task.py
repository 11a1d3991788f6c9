"""LaVIT's stage 1: learning, the codebook's start, frozen parts, several processes."""

from __future__ import annotations

import json
import os
import sys

import pytest
import stage1_toy as toy
import torch
from loop_toy import log_lines
from real_processes import run_process
from repository import ROOT

from seed_multimodal.models.lavit.losses import LavitStage1, LavitStage1Output
from seed_multimodal.models.lavit.train_tokenizer import LavitTokenizerTask
from seed_multimodal.training.codebook import CodebookHealth, codebook_use, evaluation_mode
from seed_multimodal.training.config import StageSettings

CODES = {"codebook_warmup": 4, "kmeans_start": True, "kmeans_images": 64, "restart_every": 3}
TWO = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2".split()


def measure(
    model: LavitStage1, images: torch.Tensor, quantize: bool | None = None
) -> LavitStage1Output:
    with evaluation_mode(model):
        return model(images, quantize=quantize)


@pytest.mark.slow
def test_train_lowers_the_loss_before_and_with_codes(tmp_path):
    # It learns to see more than the mean image, with part of the tokens and most codes.
    test_images, _ = toy.images(64, seed=9)
    before = measure(toy.stage1(), test_images, quantize=False)
    health = {**CODES, "codebook_warmup": 50}
    model, record = toy.train(tmp_path, max_steps=80, learning_rate=6e-3, health=health)
    after = measure(model, test_images)
    # What is reached without seeing the image.
    mean = test_images.mean(0, keepdim=True).expand_as(test_images)
    blind = 1 - torch.cosine_similarity(test_images, mean, dim=-1).mean()
    assert after.loss_cosine < 0.8 * blind < 0.3 * before.loss_cosine
    assert 0.2 < after.counts_B.sum() / test_images[..., 0].numel() < 0.5
    assert after.counts_B.min() >= 1
    assert len(after.codes_T.unique()) > 0.5 * toy.CODES
    log = log_lines(tmp_path, "tokenizer")
    assert "perplexity" not in log[40]
    assert log[60]["perplexity"] > 1
    assert 0 < log[60]["codebook_used"] <= 1
    assert log[-1]["loss_cosine"] < 0.5 * log[0]["loss_cosine"]


def test_start_codes_uses_the_whole_codebook():
    # k-means from features: codes that start at random stay unused.
    data, _ = toy.images(128)
    model = toy.stage1()
    task = LavitTokenizerTask(
        "codes",
        model,
        StageSettings(max_steps=5, batch_size=16),
        lambda step: data[16 * step : 16 * step + 16],
        CodebookHealth(kmeans_start=True, kmeans_images=128),
    )
    used = []
    for _ in range(2):
        counts = measure(model, data).codes_T.bincount(minlength=toy.CODES)
        used.append(codebook_use(counts)["codebook_used"])
        task.start_codes()
    assert used[1] == 1 > used[0]
    rows = model.quantize.embedding.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(toy.CODES))


@pytest.mark.parametrize("quantize", [True, False])
def test_freeze_selector_trains_the_token_selector_until_codes_are_used(quantize):
    # Afterwards it has no gradient.
    model = toy.stage1(freeze_selector=True)
    model(toy.images(8)[0], quantize=quantize).loss.backward()
    gradients = [part.grad for part in model.tokenizer.token_predictor.parameters()]
    assert all((gradient is None) == quantize for gradient in gradients)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    # They share one codebook; the compared run has no k-means, whose points are the first
    # process's.
    equal = {"name": "equal", "max_steps": 6, "repeatable": True}
    stage = json.dumps({**equal, "batch_size": 8})
    command = [*TWO, str(ROOT / "tests" / "support" / "stage1_toy.py"), str(tmp_path), stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = run_process(command, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr

    files = [tmp_path / f"equal.{rank}.pt" for rank in (0, 1)]
    first, second = (torch.load(file, weights_only=True) for file in files)
    model, _ = toy.train(tmp_path / "one", **equal)
    for name, value in model.state_dict().items():
        if not name.endswith("counts"):  # of each process
            assert torch.equal(first[name], second[name]), name
            # A key's bias has no gradient but noise.
            close = 1e-3 if name.endswith(("qkv.bias", "key.bias")) else 1e-5
            assert (first[name] - value).abs().max() < close, name
    two, one = (log_lines(folder, "equal") for folder in (tmp_path, tmp_path / "one"))
    for key in ("loss", "loss_cosine", "kept", "tokens", "grad"):
        expected = pytest.approx([line[key] for line in one], rel=1e-5)
        assert [line[key] for line in two] == expected, key
