"""Stage 1: gather modes, batch of one, frozen and trained tower, embedding head with prefix masking, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm_python

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model, Stage1Output

WORDS = 30
TINY = Seed2Config(vit=EvaConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=24),
                   qformer=QFormerConfig(width=24, depth=2, heads=2, mlp_width=32, max_positions=40, dropout=0.0))


def _batch(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(3, WORDS, (count, 6), generator=source)
    mask = (torch.arange(6) < torch.randint(2, 7, (count, 1), generator=source)).long()
    return torch.randn(count, 3, 16, 16, generator=source), ids * mask, mask


def _model(**options: object) -> Stage1Model:
    torch.manual_seed(0)
    return Stage1Model(TINY, vocab_size=WORDS, embed_dim=8, **options)  # type: ignore[arg-type]


def _run(model: Stage1Model, count: int = 4) -> Stage1Output:
    output = model(*_batch(count))
    output.loss.backward()
    return output


def test_batch_of_one_works() -> None:
    output = _run(_model(), count=1)
    assert output.sim_i2t.shape == (1, 1) and output.loss.isfinite()


def test_gather_gradient_only_changes_gradients() -> None:
    full, none = _model(), _model(gather_gradient=False)
    assert torch.equal(_run(full).loss, _run(none).loss)
    assert not torch.allclose(full.vision_proj.weight.grad, none.vision_proj.weight.grad)
    always = _model(gather_gradient=True)
    _run(always)
    torch.testing.assert_close(always.vision_proj.weight.grad, full.vision_proj.weight.grad)


def test_frozen_tower_stays_in_eval_mode_without_gradient() -> None:
    model = _model()
    _run(model)
    assert not model.visual_encoder.training and model.Qformer.training
    assert all(p.grad is None for p in model.visual_encoder.parameters())
    assert model.ln_vision.weight.grad is not None
    trained = _model(freeze_vit=False)
    _run(trained)
    assert trained.visual_encoder.training
    assert all(p.grad is not None for p in trained.visual_encoder.parameters())


def test_cached_tower_output_gives_the_same_loss() -> None:
    model = _model()
    images, ids, mask = _batch(4)
    with torch.no_grad():
        cached = model(None, ids, mask, vit_features=model.vit_features(images))
        torch.testing.assert_close(cached.loss, model(images, ids, mask).loss)


def test_embedding_head_sees_only_the_prefix() -> None:
    model = _model(embedding_dim=5)
    queries = torch.randn(3, 32, 24)
    keep = torch.tensor([1, 7, 32])
    moved = queries.clone()
    moved[0, 1:] += 1
    moved[1, 7:] += 1
    torch.testing.assert_close(model.predict_embedding(moved, keep), model.predict_embedding(queries, keep))
    moved[2, 31] += 1
    assert not torch.allclose(model.predict_embedding(moved, keep)[2], model.predict_embedding(queries, keep)[2])
    torch.testing.assert_close(model.predict_embedding(queries), model.embedding_head(queries.flatten(1)))


def test_embedding_loss_masks_in_training_only_and_is_seeded() -> None:
    model, target = _model(embedding_dim=5, embedding_weight=3.0), torch.randn(4, 5)
    losses = [model(*_batch(4), target_embedding=target, generator=torch.Generator().manual_seed(seed))
              for seed in (1, 1, 2)]
    assert torch.equal(losses[0].loss_embedding, losses[1].loss_embedding)
    assert not torch.equal(losses[0].loss_embedding, losses[2].loss_embedding)
    torch.testing.assert_close(losses[0].loss, losses[0].loss_itc + 3.0 * losses[0].loss_embedding)
    model.eval()
    output = model(*_batch(4), target_embedding=target)
    expected = (model.predict_embedding(output.query_output) - target).square().mean()
    torch.testing.assert_close(output.loss_embedding, expected)
    with pytest.raises(ConfigError, match="embedding_dim"):
        _model()(*_batch(4), target_embedding=target)


def test_prefix_lengths_cover_the_whole_range() -> None:
    model = _model(embedding_dim=5)
    seen: list[int] = []
    original = model.predict_embedding
    model.predict_embedding = lambda q, keep=None: (seen.extend(keep.tolist()), original(q, keep))[1]  # type: ignore
    source = torch.Generator().manual_seed(0)
    for _ in range(60):
        model._embedding_loss(torch.zeros(16, 32, 24), torch.zeros(16, 5), source)
    assert set(seen) == set(range(1, 33))


def test_a_few_steps_learn_the_pairs() -> None:
    model = _model(lm_head=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = last = _run(model).loss_itc.item()
    for _ in range(25):
        optimizer.step()
        optimizer.zero_grad()
        last = _run(model).loss_itc.item()
    assert last < 0.7 * first


class _Given(torch.nn.Module):
    """Hidden states in place of the Q-Former's: the contrast alone is measured."""

    def __init__(self, image: torch.Tensor, text: torch.Tensor) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Parameter(image), torch.nn.Parameter(text)

    def forward(self, *args: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return (self.image if args else self.text)[:, None]


def _contrast_gradients(dtype: torch.dtype, mixed: torch.dtype | None) -> list[torch.Tensor]:
    """Gradients of the contrast of 64 pairs that are about as alike as a trained model's, temperature 0.07."""
    source = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    common, pairs = draw(1, 768), draw(64, 768)  # embeddings of all pictures have much in common
    image, text = (4 * common + pairs + 0.5 * draw(64, 768) for _ in range(2))
    torch.manual_seed(0)
    model = Stage1Model(TINY, vocab_size=WORDS, embed_dim=256)
    model.vision_proj, model.text_proj = torch.nn.Linear(768, 256), torch.nn.Linear(768, 256)
    model.text_proj.load_state_dict(model.vision_proj.state_dict())
    model.Qformer = given = _Given(image, text)  # type: ignore[assignment]
    model.ln_vision = torch.nn.Identity()  # type: ignore[assignment]
    model.to(dtype)
    scale = 1024.0 if mixed is torch.float16 else 1.0  # as GradScaler's
    with torch.autocast("cpu", mixed, enabled=mixed is not None):
        loss = model(None, torch.zeros(64, 2), vit_features=torch.zeros(64, 1, 1, dtype=dtype)).loss
    (loss * scale).backward()
    trained = [given.image, given.text, model.vision_proj.weight, model.text_proj.weight, model.temp]
    return [one.grad.double() / scale for one in trained]  # type: ignore[union-attr]


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_the_contrast_is_computed_in_fp32_under_autocast(mixed: torch.dtype) -> None:
    """Error of the gradient against fp64; with half-precision products it is 2 to 4 % in bf16, 0.2 % in fp16."""
    exact, made = _contrast_gradients(torch.float64, None), _contrast_gradients(torch.float32, mixed)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(made, exact, strict=True)]
    assert max(errors) < 1e-4, errors


def _worker(rank: int, rendezvous: str, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        model = _model(gather_gradient=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # torch's own gather with gradients is deprecated
            model(*(part.chunk(2)[rank] for part in _batch(4))).loss.backward()
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{place}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.process
def test_two_processes_with_gradient_equal_one_large_batch() -> None:
    """The mean of the processes' gradients is the gradient of the whole batch when the gather carries gradients."""
    model = _model()
    _run(model)
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        workers = [subprocess.Popen([warm_python.PYTHON, __file__, str(rank), f"{place}/rendezvous", place],
                                    env=environment) for rank in range(2)]
        assert [worker.wait(150) for worker in workers] == [0, 0]
        ranks = [torch.load(Path(place) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, parameter.grad, rtol=1e-3, atol=1e-6)


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
