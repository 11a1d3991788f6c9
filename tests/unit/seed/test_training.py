"""SEED's training modules (the originals' losses and gradients: golden `stage1_losses`,
`stage2_losses`)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tensors import normal
from tiny.seed import SIZES, loud, seed1_config
from torch import Tensor, nn
from torch.testing import assert_close

from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.recipes.seed.losses import (
    Seed1Stage2Model,
    Seed1Stage2Weights,
    Stage1Model,
    Stage1Output,
    Stage1TrainingOptions,
    Stage2Model,
    Stage2TrainingOptions,
    project_and_normalize,
    similarities,
)

TINY = Seed2Config(**{**SIZES, "qformer": replace(SIZES["qformer"], dropout=0.0)})


# ---- stage 1


def stage1(embedding_dim: int | None = None, **options) -> Stage1Model:
    torch.manual_seed(0)
    training = Stage1TrainingOptions(embed_dim=8, **options)
    return Stage1Model(TINY, options=training, vocab_size=30, embedding_dim=embedding_dim)


def run(model: Stage1Model, **inputs) -> Stage1Output:
    """The losses of four images with captions."""
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 30, (4, 6), generator=source)
    mask = (torch.arange(6) < torch.randint(2, 7, (4, 1), generator=source)).long()
    return model(torch.randn(4, 3, 16, 16, generator=source), ids * mask, mask, **inputs)


def test_stage1_embedding_loss_in_training_and_evaluation():
    # A random prefix of the queries is used in training only.
    model = stage1(embedding_dim=5, embedding_weight=3.0)
    target = torch.randn(4, 5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(model, target_embedding=target))
    first, again, other = outputs
    assert first.loss_embedding == again.loss_embedding != other.loss_embedding
    assert_close(first.loss, first.loss_itc + 3.0 * first.loss_embedding)
    output = run(model.eval(), target_embedding=target)
    expected = F.mse_loss(model.embedding_head(output.query_output.flatten(1)), target)
    assert_close(output.loss_embedding, expected)


def test_stage1_starts_from_berts_text_layers():
    # In both branches, and the decoder of words shares their table.
    qformer = stage1().Qformer
    layer = qformer.bert.encoder.layer[1]
    text_weight = layer.intermediate.dense.weight
    assert torch.equal(layer.intermediate_query.dense.weight, text_weight)
    assert qformer.cls.predictions.decoder.weight is qformer.bert.embeddings.word_embeddings.weight


def test_stage1_contrast_is_computed_in_fp32_under_autocast():
    # In half precision the similarities of hundreds of pairs are equal, and gradients off by 4 %.
    rows = torch.randn(64, 768)
    projection = nn.Linear(768, 256)

    def contrast():
        return similarities(*(project_and_normalize(projection, part) for part in (rows, -rows)))

    exact = contrast()
    with torch.autocast("cpu", torch.bfloat16):
        logits = contrast()
    assert logits.dtype == torch.float32
    assert_close(logits, exact, atol=1e-5, rtol=1e-5)


# ---- stage 2

DECODERS = {
    "seed2": (
        "pos_embed pos_embed_image quantize encode_task_layer decode_task_layer blocks "
        "blocks_image image_down distill_image_proj"
    ),
    "seed1": (
        "pos_embed blocks pos_embed_text blocks_text quantize encode_task_layer "
        "decode_task_layer Reverse_Qformer reverse_tokens distill_text_proj"
    ),
}


@pytest.fixture(params=DECODERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def target(kind) -> Tensor:
    size = (5, 10) if kind == "seed2" else (5, 7, 16)
    return normal(2, *size)


def stage2(kind: str, tiny: Seed2Config, **options):
    torch.manual_seed(0)
    if kind == "seed2":
        return Stage2Model(tiny, **options)
    return Seed1Stage2Model(seed1_config(), **options)


def trained_parts(model) -> set[str]:
    """Of the parts that have gradients; each of their parameters must have one: an error in DDP."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert [name for name, value in trained.items() if value.grad is None] == []
    return {name.split(".")[0] for name in trained}


def test_stage2_trains_the_decoder_or_the_qformer_too(kind, tiny, images, target):
    # Nothing frozen is trained, nothing trained is frozen.
    decoder = set(DECODERS[kind].split())
    for frozen, parts in ((True, set()), (False, {"Qformer", "query_tokens", "ln_vision"})):
        model = stage2(kind, tiny, options=Stage2TrainingOptions(freeze_qformer=frozen))
        model(images, target).loss.backward()
        assert trained_parts(model) == decoder | parts


def test_stage2_with_and_without_frozen_dropout(kind, tiny, images):
    noisy = stage2(kind, tiny)
    clean = stage2(kind, tiny, options=Stage2TrainingOptions(frozen_dropout=False))
    assert not torch.equal(noisy.query_features(images), noisy.query_features(images))
    assert torch.equal(clean.query_features(images), clean.query_features(images))
    assert not noisy.visual_encoder.training
    assert not noisy.eval().Qformer.training


def test_stage2_seed1_loss_is_the_weighted_sum(images):
    target = torch.randn(5, 7, 16)
    model = loud(stage2("seed1", TINY, weights=Seed1Stage2Weights(1.0, 3.0, 4.0))).eval()
    out = model(images, target)
    assert_close(out.loss, out.loss_embed + out.loss_recon_s + out.loss_distil)
    codebook = F.mse_loss(model.quantize.embedding(out.indices), out.pre_quant)
    assert_close(out.loss_embed, 1.25 * codebook)
    assert_close(out.loss_distil, 4.0 * F.mse_loss(out.embeds, target))
    assert_close(out.embeds.detach(), model.decode(out.indices), atol=1e-4, rtol=1e-4)


def test_stage2_warm_up_without_quantizer(kind, tiny, images, target):
    # The first steps train on features; the codebook is not touched.
    model = stage2(kind, tiny, options=Stage2TrainingOptions(frozen_dropout=False))
    out = model(images, target, quantize=False)
    out.loss.backward()
    assert out.indices is None
    assert out.loss_embed == 0
    assert torch.equal(out.quant, out.pre_quant)
    assert model.quantize.embedding.weight.grad is None
    assert model.encode_task_layer[0].weight.grad is not None


def test_corrupt_codes_swaps_up_to_the_given_fraction(tiny):
    model = Stage2Model(tiny, options=Stage2TrainingOptions(corrupt=0.5))
    quant = torch.full((400, 32, 6), 7.0, requires_grad=True)
    swapped = model.corrupt_codes(quant)
    # The fraction differs between samples.
    share = (swapped != quant).any(-1).float().mean(1)
    assert share.max() < 0.8
    assert share.mean() == pytest.approx(0.25, abs=0.03)
    assert share.std() > 0.1
    assert torch.equal(model.eval().corrupt_codes(quant), quant)


def test_keep_prefix_of_random_lengths(tiny):
    # Half of the images keep all codes, the others 1 to 32 of them.
    model = Stage2Model(tiny, options=Stage2TrainingOptions(nested=0.5))
    quant = torch.ones(2000, 32, 6)
    mask = model.keep_prefix(quant)[..., 0].bool()
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(32) < lengths[:, None])
    assert lengths.min() == 1
    assert (lengths == 32).float().mean() == pytest.approx(0.5 + 0.5 / 32, abs=0.04)
    assert torch.equal(model.eval().keep_prefix(quant), quant)
