"""LaVIT's stage 1: learning, the codebook's start, several processes."""

import pytest
import stage1_toy as toy
import torch

from seed_multimodal.nn.layers import evaluating
from seed_multimodal.recipes.lavit.losses import LavitStage1, LavitStage1Output
from seed_multimodal.recipes.lavit.train_tokenizer import LavitTokenizerTask
from seed_multimodal.training.codebook import CodebookHealth, codebook_use
from seed_multimodal.training.config import StageSettings

CODES = {"codebook_warmup": 4, "kmeans_start": True, "kmeans_images": 64, "restart_every": 3}


def measure(
    model: LavitStage1, images: torch.Tensor, quantize: bool | None = None
) -> LavitStage1Output:
    with torch.no_grad(), evaluating(model):
        return model(images, quantize=quantize)


@pytest.mark.slow
def test_train_lowers_the_loss_before_and_with_codes(tmp_path):
    # It learns to see more than the mean image, with part of the tokens and most codes.
    test_images, _ = toy.images(64, seed=9)
    before = measure(toy.stage1(), test_images, quantize=False)
    health = {**CODES, "codebook_warmup": 50}
    model, _ = toy.train(tmp_path, max_steps=80, learning_rate=6e-3, health=health)
    after = measure(model, test_images)
    # What is reached without seeing the image.
    mean = test_images.mean(0, keepdim=True).expand_as(test_images)
    blind = 1 - torch.cosine_similarity(test_images, mean, dim=-1).mean()
    loss, start = (output.metrics["loss_cosine"] for output in (after, before))
    assert loss < 0.8 * blind < 0.3 * start
    assert 0.2 < after.metrics["kept"] < 0.5
    assert len(after.codes_T.unique()) > 0.5 * toy.CODES


@pytest.fixture
def data() -> torch.Tensor:
    return toy.images(128)[0]


@pytest.fixture
def task(data) -> LavitTokenizerTask:
    return LavitTokenizerTask(
        "codes",
        toy.stage1(),
        StageSettings(max_steps=50, batch_size=16),
        lambda step: data[16 * step : 16 * step + 16],
        CodebookHealth(kmeans_start=True, kmeans_images=1000, restart_every=1),
    )


def test_start_codes_uses_the_whole_codebook(task, data):
    # k-means from features, of each image once: codes that start at random stay unused.
    model = task.model
    task.n_images = len(data)
    used = []
    for _ in range(2):
        counts = measure(model, data).codes_T.bincount(minlength=toy.CODES)
        used.append(codebook_use(counts)["codebook_used"])
        task.start_codes()
    assert used[1] == 1 > used[0]
    rows = model.quantize.embedding.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(toy.CODES))


def test_dead_codes_are_those_that_many_features_missed(task, data):
    # With small batches a step misses most codes, also those in use.
    uses = [0]
    for step in range(1, 16):
        counts = task.model.train()(data[8 * step : 8 * step + 8]).codes_T.bincount(minlength=32)
        before = uses[-1] + counts.sum().item()
        task.after_step(step)
        uses.append(task.codebook.since_restart.sum().item())
        assert uses[-1] == (before if before < 10 * toy.CODES else 0)
    assert 0 in uses[1:]
    # Codes that moved onto features are used.
    assert len(measure(task.model, data).codes_T.unique()) > toy.CODES / 2


@pytest.mark.nightly
@pytest.mark.process
def test_two_processes_train_one_model_and_codebook(tmp_path):
    # Codebooks that move by each process's own images make tokenizers that differ by the rank.
    torch.multiprocessing.spawn(toy.train_in_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = toy.stage1().quantize.embedding.weight
    assert not torch.equal(first["tokenizer.quantize.embedding.weight"], start)
    for name, value in first.items():
        if not name.endswith("counts"):  # of each process
            assert torch.equal(value, second[name]), name
