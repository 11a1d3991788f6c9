"""LaVIT's stage 1: learning, the codebook's start, frozen parts, several processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import stage1_toy as toy
import torch
import warm_python
from repository import ROOT

from seed_multimodal.models.lavit.losses import LavitStage1, LavitStage1Output
from seed_multimodal.models.lavit.train_tokenizer import LavitTokenizerTask, stage1_groups
from seed_multimodal.training.codebook import CodebookHealth, codebook_use, evaluation_mode
from seed_multimodal.training.config import StageSettings

CODES = {"codebook_warmup": 4, "kmeans_start": True, "kmeans_images": 64, "restart_every": 3}
TWO = f"{warm_python.PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2".split()


def measure(
    model: LavitStage1, images: torch.Tensor, quantize: bool | None = None
) -> LavitStage1Output:
    with evaluation_mode(model):
        return model(images, quantize=quantize)


def lines(folder: Path, name: str = "tokenizer") -> list[dict[str, float]]:
    """A run's log."""
    return [json.loads(line) for line in (folder / f"{name}.log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_lowers_the_loss_before_and_with_codes(tmp_path):
    test_images, _ = toy.images(64, seed=9)
    before = measure(toy.stage1(), test_images, quantize=False)
    model, record = toy.train(
        tmp_path, max_steps=80, learning_rate=6e-3, health={**CODES, "codebook_warmup": 50}
    )
    after = measure(model, test_images)
    mean = test_images.mean(0, keepdim=True).expand_as(test_images)
    blind = (
        1 - torch.cosine_similarity(test_images, mean, dim=-1).mean()
    )  # reached without seeing the image
    assert after.loss_cosine < 0.8 * blind < 0.3 * before.loss_cosine
    assert (
        0.2 < after.counts_B.sum() / test_images[..., 0].numel() < 0.5 and after.counts_B.min() >= 1
    )
    assert len(after.codes_T.unique()) > 0.5 * toy.CODES and before.codes_T is None
    log = lines(tmp_path)
    assert {
        "loss_cosine",
        "loss_ratio",
        "kept",
        "tokens",
        "tokens_deviation",
        "tokens_least",
        "tokens_most",
    } <= set(log[40])
    assert "perplexity" not in log[40] and {
        "codebook_used",
        "perplexity",
        "loss_commitment",
    } <= set(log[60])
    assert log[-1]["loss_cosine"] < 0.5 * log[0]["loss_cosine"] and record["loss_cosine"] > 0


def test_start_codes_uses_the_whole_codebook():
    data, _ = toy.images(128)
    model = toy.stage1()
    task = LavitTokenizerTask(
        "codes",
        model,
        StageSettings(max_steps=5, batch_size=16),
        lambda step: data[16 * step : 16 * step + 16],
        CodebookHealth(kmeans_start=True, kmeans_images=128),
    )
    at_random = codebook_use(measure(model, data).codes_T.bincount(minlength=toy.CODES))
    task.start_codes()
    at_centres = codebook_use(measure(model, data).codes_T.bincount(minlength=toy.CODES))
    assert at_centres["codebook_used"] == 1 > at_random["codebook_used"]
    assert at_centres["perplexity"] > 1.5 * at_random["perplexity"]
    rows = model.quantize.embedding.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(toy.CODES))


def test_stage1_groups_scale_the_token_selectors_rate():
    model = toy.stage1()
    groups = stage1_groups(model, 0.1, 0.25)
    scales = {
        id(parameter): group.get("lr_scale", 1.0)
        for group in groups
        for parameter in group["params"]
    }
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert scales.keys() == {id(parameter) for parameter in trained.values()}
    assert all(
        (scales[id(parameter)] == 0.25) == ("token_predictor" in name)
        for name, parameter in trained.items()
    )
    assert not any(
        part in name
        for name in trained
        for part in ("tokenizer.encoder.", "vit_proj", "unet_", "quantize")
    )


def test_freeze_selector_trains_the_token_selector_until_codes_are_used(tmp_path):
    def selector(model: LavitStage1) -> torch.Tensor:
        return torch.cat(
            [part.detach().flatten() for part in model.tokenizer.token_predictor.parameters()]
        )

    trained, _ = toy.train(
        tmp_path, max_steps=8, health=CODES, freeze_selector=True, learning_rate=1e-2
    )
    start = toy.stage1(freeze_selector=True)
    assert not torch.equal(selector(trained), selector(start))  # by the steps without codes
    for quantize in (True, False):
        start(toy.images(8)[0], quantize=quantize).loss.backward()
        assert all(
            (part.grad is None) == quantize for part in start.tokenizer.token_predictor.parameters()
        )


@pytest.mark.process
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    """They share one codebook.

    The compared run has no k-means, whose points are the first process's.
    """
    equal = {"name": "equal", "max_steps": 6, "repeatable": True}
    centres = {"name": "centres", "max_steps": 10, "health": CODES, "batch_size": 8}
    done = subprocess.run(
        [
            *TWO,
            str(ROOT / "tests" / "support" / "stage1_toy.py"),
            str(tmp_path),
            json.dumps({**equal, "batch_size": 8}),
            json.dumps(centres),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    model, _ = toy.train(tmp_path / "one", **equal)
    first, second = (
        torch.load(tmp_path / f"equal.{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name, value in model.state_dict().items():
        if not name.endswith("counts"):  # of each process
            assert torch.equal(first[name], second[name]), name
            close = (
                1e-3 if name.endswith(("qkv.bias", "key.bias")) else 1e-5
            )  # a key's bias has no gradient but noise
            assert (first[name] - value).abs().max() < close, name
    torch.testing.assert_close(
        first["tokenizer.quantize.ema_sum"], model.quantize.ema_sum, rtol=1e-4, atol=1e-6
    )
    two, one = (lines(folder, "equal") for folder in (tmp_path, tmp_path / "one"))
    for key in ("loss", "loss_cosine", "kept", "tokens", "grad"):
        assert [line[key] for line in two] == pytest.approx(
            [line[key] for line in one], rel=1e-5
        ), key
    first, second = (
        torch.load(tmp_path / f"centres.{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    codebook = [name for name in first if "quantize." in name]
    assert len(codebook) >= 3 and all(torch.equal(first[name], second[name]) for name in codebook)
