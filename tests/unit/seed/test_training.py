"""SEED training modules: stage 1 (gather, precision, embedding head, two processes), stage 2
(losses, corruption).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny_seed1
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm_python
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed2Config
from seed_multimodal.models.seed.losses import (
    Seed1Stage2Model,
    Seed1Stage2Weights,
    Stage1Model,
    Stage1Output,
    Stage2Model,
    Stage2Weights,
    project_and_normalize,
    similarities,
)
from seed_multimodal.nn.vision.eva import EvaConfig

WORDS = 30
TINY = Seed2Config(
    vit=EvaConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=24),
    qformer=QFormerConfig(width=24, depth=2, heads=2, mlp_width=32, max_positions=40, dropout=0.0),
)


# ---- stage 1


def _batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(3, WORDS, (count, 6), generator=source)
    mask = (torch.arange(6) < torch.randint(2, 7, (count, 1), generator=source)).long()
    return torch.randn(count, 3, 16, 16, generator=source), ids * mask, mask


def _model(**options: Any) -> Stage1Model:
    torch.manual_seed(0)
    return Stage1Model(TINY, vocab_size=WORDS, embed_dim=8, **options)


def _run(model: Stage1Model) -> Stage1Output:
    output = model(*_batch(4))
    output.loss.backward()
    return output


def test_stage1_gather_gradient_changes_gradients_only():
    full = _model()
    none = _model(gather_gradient=False)
    always = _model(gather_gradient=True)
    assert torch.equal(_run(full).loss, _run(none).loss)
    assert not torch.allclose(full.vision_proj.weight.grad, none.vision_proj.weight.grad)
    _run(always)
    torch.testing.assert_close(always.vision_proj.weight.grad, full.vision_proj.weight.grad)


def test_stage1_frozen_vision_encoder_stays_in_eval_mode():
    for frozen in (True, False):
        model = _model(freeze_vit=frozen)
        _run(model)
        assert model.visual_encoder.training is not frozen and model.Qformer.training
        assert all((p.grad is None) is frozen for p in model.visual_encoder.parameters())


def test_stage1_embedding_loss_in_training_and_evaluation():
    """A random prefix of the queries is used in training only."""
    model = _model(embedding_dim=5, embedding_weight=3.0)
    target = torch.randn(4, 5)
    losses = [
        model(*_batch(4), target_embedding=target, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0].loss_embedding, losses[1].loss_embedding)
    assert not torch.equal(losses[0].loss_embedding, losses[2].loss_embedding)
    torch.testing.assert_close(losses[0].loss, losses[0].loss_itc + 3.0 * losses[0].loss_embedding)
    model.eval()
    output = model(*_batch(4), target_embedding=target)
    expected = (model.embedding_head(output.query_output.flatten(1)) - target).square().mean()
    torch.testing.assert_close(output.loss_embedding, expected)


def _contrast_gradients(dtype: torch.dtype, mixed: torch.dtype | None) -> list[Tensor]:
    """Gradients of the contrastive loss of 64 pairs about as similar as a trained model's,
    temperature 0.07.
    """
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    # Embeddings of all images have much in common.
    common = draw(1, 768)
    pairs = draw(64, 768)
    hidden = [
        (4 * common + pairs + 0.5 * draw(64, 768)).to(dtype).requires_grad_() for _ in range(2)
    ]
    torch.manual_seed(0)
    projection = nn.Linear(768, 256).to(dtype)
    scale = 1024.0 if mixed is torch.float16 else 1.0  # as GradScaler's
    with torch.autocast("cpu", mixed, enabled=mixed is not None):
        image, text = (project_and_normalize(projection, rows) for rows in hidden)
        loss = F.cross_entropy(
            similarities(image, text) / 0.07, torch.arange(64), label_smoothing=0.1
        )
    (loss * scale).backward()
    return [tensor.grad.double() / scale for tensor in (*hidden, projection.weight)]  # type: ignore[union-attr]


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_stage1_contrast_is_computed_in_fp32_under_autocast(mixed):
    """Error of the gradient against fp64.

    With half-precision products it is 2 to 4 % in bf16, 0.2 % in fp16.
    """
    exact = _contrast_gradients(torch.float64, None)
    gradients = _contrast_gradients(torch.float32, mixed)
    errors = [
        float((value - other).norm() / other.norm())
        for value, other in zip(gradients, exact, strict=True)
    ]
    assert max(errors) < 1e-4, errors


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        model = _model(gather_gradient=True)
        model(*(part.chunk(2)[rank] for part in _batch(4))).loss.backward()
        torch.save(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            f"{folder}/{rank}.pt",
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.process
def test_stage1_in_two_processes_equals_one_large_batch():
    """With `gather_gradient` the mean of the processes' gradients is the gradient of the whole
    batch.
    """
    model = _model()
    _run(model)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        workers = [
            subprocess.Popen(
                [warm_python.PYTHON, __file__, str(rank), f"{folder}/rendezvous", folder],
                env=environment,
            )
            for rank in range(2)
        ]
        assert [worker.wait(150) for worker in workers] == [0, 0]
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                (ranks[0][name] + ranks[1][name]) / 2, parameter.grad, rtol=1e-3, atol=1e-6
            )


# ---- stages 2

DECODERS = {
    "seed2": {
        "pos_embed",
        "pos_embed_image",
        "quantize",
        "encode_task_layer",
        "decode_task_layer",
        "blocks",
        "blocks_image",
        "image_down",
        "distill_image_proj",
    },
    "seed1": {
        "pos_embed",
        "blocks",
        "pos_embed_text",
        "blocks_text",
        "quantize",
        "encode_task_layer",
        "decode_task_layer",
        "Reverse_Qformer",
        "reverse_tokens",
        "distill_text_proj",
    },
}


@pytest.fixture(params=DECODERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def target(kind: str) -> Tensor:
    return torch.randn(
        (5, 10) if kind == "seed2" else (5, 7, 16), generator=torch.Generator().manual_seed(2)
    )


def _stage2(kind: str, tiny: Seed2Config, **options: Any) -> Any:
    torch.manual_seed(0)
    return (
        Stage2Model(tiny, **options)
        if kind == "seed2"
        else Seed1Stage2Model(tiny_seed1.config(), **options)
    )


def _trained(model: nn.Module) -> set[str]:
    return {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_stage2_trains_the_decoder_or_the_qformer_too(
    kind: str, tiny: Seed2Config, images: Tensor, target: Tensor
):
    frozen = _stage2(kind, tiny)
    frozen(images, target).loss.backward()
    assert _trained(frozen) == DECODERS[kind]
    free = _stage2(kind, tiny, freeze_qformer=False)
    free(images, target).loss.backward()
    assert _trained(free) == DECODERS[kind] | {"Qformer", "query_tokens", "ln_vision"}


def test_stage2_with_and_without_frozen_dropout(kind: str, tiny: Seed2Config, images: Tensor):
    noisy = _stage2(kind, tiny)
    clean = _stage2(kind, tiny, frozen_dropout=False)
    assert (
        noisy.Qformer.training and not clean.Qformer.training and not noisy.visual_encoder.training
    )
    assert not torch.equal(noisy.encoder_output(images), noisy.encoder_output(images))
    features = clean.visual_encoder(images)
    assert torch.equal(clean.encoder_output(None, features), clean.encoder_output(images))
    assert not noisy.eval().Qformer.training


def test_stage2_seed2_loss_is_the_weighted_sum(tiny: Seed2Config, images: Tensor):
    readout = torch.randn(7, 10)
    target = torch.randn(5, 10)
    model = Stage2Model(
        tiny,
        weights=Stage2Weights(1.0, 3.0, 4.0, 0.5),
        frozen_dropout=False,
        readout_weight=readout,
    )
    out = model(images, target)
    torch.testing.assert_close(
        out.loss, out.loss_embed + out.loss_recon_s + out.loss_distil + out.loss_readout
    )
    torch.testing.assert_close(out.loss_embed, out.loss_embed_raw)
    torch.testing.assert_close(out.loss_distil, 4.0 * F.mse_loss(out.embeds, target))
    torch.testing.assert_close(
        out.loss_readout, 0.5 * F.mse_loss(out.embeds @ readout.T, target @ readout.T)
    )
    cosine = F.cosine_similarity(out.recon_s, out.query_output, dim=-1)
    torch.testing.assert_close(out.loss_recon_s, 3.0 * (1 - cosine).mean())
    assert "readout_weight" not in model.state_dict()


def test_stage2_seed1_loss_is_the_weighted_sum(images: Tensor):
    target = torch.randn(5, 7, 16)
    model = tiny_seed1.loud(
        _stage2("seed1", TINY, weights=Seed1Stage2Weights(1.0, 3.0, 4.0))
    ).eval()
    out = model(images, target)
    torch.testing.assert_close(out.loss, out.loss_embed + out.loss_recon_s + out.loss_distil)
    codebook = F.mse_loss(model.quantize.embedding(out.indices), out.pre_quant)
    torch.testing.assert_close(out.loss_embed, 1.25 * codebook)
    torch.testing.assert_close(out.loss_distil, 4.0 * F.mse_loss(out.embeds, target))
    torch.testing.assert_close(out.embeds.detach(), model.decode(out.indices), atol=1e-4, rtol=1e-4)


def test_stage2_seed1_with_a_text_encoder(images: Tensor):
    encoder = tiny_seed1.text_encoder()
    model = Seed1Stage2Model(tiny_seed1.config(), text_encoder=encoder, frozen_dropout=False)
    assert (
        not any(p.requires_grad for p in encoder.parameters())
        and not model.train().text_encoder.training
    )
    ids = torch.tensor([[2, 0, 1, 3, 3, 3, 3], [2, 1, 3, 3, 3, 3, 3]] * 2 + [[2, 3, 3, 3, 3, 3, 3]])
    out = model(images, input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(out.target, encoder(ids).last_hidden_state)
    out.loss.backward()
    assert _trained(model) == DECODERS["seed1"]
    with pytest.raises(ConfigError, match="needs target text features"):
        model(images)


def test_stage2_warm_up_without_quantizer(
    kind: str, tiny: Seed2Config, images: Tensor, target: Tensor
):
    model = _stage2(kind, tiny, frozen_dropout=False)
    out = model(images, target, quantize=False)
    assert (
        out.indices is None
        and float(out.loss_embed) == 0.0
        and torch.equal(out.quant, out.pre_quant)
    )
    out.loss.backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.encode_task_layer[0].weight.grad is not None


def test_corrupt_codes_swaps_up_to_the_given_fraction(tiny: Seed2Config):
    model = Stage2Model(tiny, corrupt=0.5)
    quant = torch.full((400, 32, 6), 7.0, requires_grad=True)
    swapped = model.corrupt_codes(quant, torch.Generator().manual_seed(0))
    share = (swapped != quant).any(-1).float().mean(1)
    assert share.max() < 0.8 and share.mean() == pytest.approx(0.25, abs=0.03)
    assert share.std() > 0.1, "the fraction differs between samples"
    rows = {tuple(row) for row in model.quantize.embedding.weight.tolist()}
    assert all(tuple(row) in rows for row in swapped[(swapped != quant).any(-1)].tolist())
    assert torch.equal(model.corrupt_codes(quant, torch.Generator().manual_seed(0)), swapped)
    swapped.sum().backward()
    assert model.quantize.embedding.weight.grad is None
    assert torch.equal(model.eval().corrupt_codes(quant, None), quant)


def test_keep_prefix_of_random_lengths(tiny: Seed2Config):
    model = Stage2Model(tiny, nested=0.5)
    quant = torch.ones(2000, 32, 6)
    mask = model.keep_prefix(quant, torch.Generator().manual_seed(0))[..., 0].bool()
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(32) < lengths[:, None])
    assert lengths.min() == 1 and (lengths == 32).float().mean() == pytest.approx(
        0.5 + 0.5 / 32, abs=0.04
    )
    assert lengths[lengths < 32].float().mean() == pytest.approx(16, abs=1)
    assert torch.equal(model.eval().keep_prefix(quant, None), quant)


def test_load_stage1_fills_the_encoder(kind: str, tiny: Seed2Config, images: Tensor):
    second = _stage2(kind, tiny)
    first = Stage1Model(
        Seed2Config(vit=second.config.vit, qformer=second.config.qformer),
        vocab_size=30,
        embed_dim=8,
        embedding_dim=10,
    ).eval()
    report = second.load_stage1(first.state_dict())
    assert {name.split(".")[0] for name in report.loaded} == {
        "visual_encoder",
        "ln_vision",
        "Qformer",
        "query_tokens",
    }
    with torch.no_grad():
        expected = first.query_features_from(first.vit_features(images))
    torch.testing.assert_close(second.eval().query_features(images), expected)
    trained = {n: v for n, v in first.state_dict().items() if not n.startswith("visual_encoder.")}
    assert any(name.startswith("visual_encoder.") for name in second.load_stage1(trained).missing)


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
