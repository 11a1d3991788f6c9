"""Runs with vision encoders of transformers: from images to codes, by the printed commands."""

import pytest
import torch
from lavis_runs import log_of
from tiny.vision import write_vision
from torch.testing import assert_close

TARGET = "model.alignment_target=encoder"
SHORT = ("run.max_epoch=1", "run.iters_per_epoch=2")


def vit_option(folder) -> str:
    return f"model.vit={{type: hub, path: {folder}}}"


def test_load_config_prepares_images_for_the_encoder(tmp_path):
    # Shorter side and centre crop of DINOv2, also in evaluation, whatever the YAML says.
    from seed_lavis.options import load_config

    write_vision("dinov2", tmp_path)
    project = "lavis/projects/blip2/train/pretrain_codebook.yaml"
    resizing = {"interpolation": "bicubic", "image_size": 16}
    views = {"name": "blip2_image_train", **resizing}
    whole = {"name": "blip_image_eval", "keep_ratio": True, "shorter_side": 20, **resizing}
    for expected in (views, whole):
        name = f"datasets.conceptual_caption_3m.vis_processor.train.name={expected['name']}"
        config = load_config(project, [vit_option(tmp_path), name])
        processors = config.datasets_cfg.conceptual_caption_3m.vis_processor
        assert (processors.train, processors.eval) == (expected, whole)
        # Nor are EVA's weights those of the encoder.
        assert config.model_cfg.vit_weights is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip2", "dinov3"])
def test_train_towards_the_encoders_own_feature(kind, yaml, run, tmp_path):
    # Both stages of encoders with a pooling head, a class token or registers; bf16 the second.
    network = write_vision(kind, tmp_path / "vision")
    vit = vit_option(tmp_path / "vision")
    run(yaml("stage1", vit, "model.freeze_vit=True", *SHORT))
    start = f"model.pretrained={tmp_path}/stage1/checkpoint_0.pth"
    model = run(yaml("stage2", start, vit, TARGET, "model.vit_precision=bf16", *SHORT)).model
    assert model.config.image_features_dim == 16
    encoder = model.visual_encoder
    assert any(weight.dtype == torch.bfloat16 for weight in encoder.parameters())
    pixels = torch.randn(2, 3, 16, 16)
    features, pooled = model.features_and_target(pixels)
    assert features.dtype == pooled.dtype == torch.float32
    if kind != "siglip2":  # which reads patches
        with torch.no_grad():
            expected = network(pixel_values=pixels)
        assert_close(features, expected.last_hidden_state, rtol=0.1, atol=0.1)
        assert_close(pooled, expected.pooler_output, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_train_the_encoder_and_its_own_feature(yaml, run, tmp_path):
    # Stage 1 trains SigLIP and reads its feature from the queries; stage 2 gets all of it.
    write_vision("siglip", tmp_path / "vision")
    vit = vit_option(tmp_path / "vision")
    trained = ["model.freeze_vit=False", "model.embedding_weight=2.0", "model.vit_precision=fp32"]
    model = run(yaml("stage1", vit, TARGET, *trained, *SHORT)).model
    line = log_of(tmp_path / "stage1", "stage1")[1]
    assert line["loss"] == pytest.approx(line["loss_itc"] + 2 * line["loss_embedding"], rel=1e-5)
    start = f"model.pretrained={tmp_path}/stage1/checkpoint_0.pth"
    second = run(yaml("stage2", start, vit, TARGET, *SHORT)).model
    expected = model.visual_encoder.state_dict()
    assert any("head" in name for name in expected)
    for name, tensor in second.visual_encoder.state_dict().items():
        assert_close(tensor, expected[name])
