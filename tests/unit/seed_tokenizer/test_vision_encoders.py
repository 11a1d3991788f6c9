"""Runs with vision encoders of transformers: from images to codes, by the printed commands."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lavis_runs import APPLICATION, log_of, printed
from omegaconf import OmegaConf
from PIL import Image
from repository import ROOT
from tiny.training import seed_decoder_config, write_seed_decoder_parts
from tiny.vision import write_vision

TARGET = "model.alignment_target=encoder"
SHORT = ("run.max_epoch=1", "run.iters_per_epoch=2")
CAT = ROOT / "images" / "cat.jpg"


def vit_option(folder: Path) -> str:
    return f"model.vit={{type: hub, path: {folder}}}"


def test_load_config_prepares_images_for_the_encoder(tmp_path):
    # Shorter side and centre crop of DINOv2, also in evaluation, whatever the YAML says.
    from seed_lavis import register
    from seed_lavis.options import load_config

    register()
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
@pytest.mark.parametrize("kind", ["siglip2", "dinov2", "dinov3", "clip"])
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
    features, pooled = model.encode_pooled(pixels)
    assert features.dtype == pooled.dtype == torch.float32
    if kind != "siglip2":  # which reads patches
        with torch.no_grad():
            expected = network(pixel_values=pixels)
        torch.testing.assert_close(features, expected.last_hidden_state, rtol=0.1, atol=0.1)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0.1, atol=0.1)


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
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.process
@pytest.mark.slow
def test_tokenizer_and_decoder_of_siglip_by_the_printed_commands(
    yaml, start, run, images, tmp_path, capsys
):
    # Both stages, the first as a process, export, codes, a decoder's training, an image, the
    # evaluation; sizes of EVA in the YAML are replaced by the encoder's.
    from seed_multimodal.cli.main import main
    from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask

    # 1. The tokenizer; without its folder the encoder still gives the target.
    write_vision("siglip", tmp_path / "vision")
    options = [vit_option(tmp_path / "vision"), "model.freeze_vit=True", *SHORT]
    train = str(APPLICATION / "train.py")
    output, error = start(sys.executable, train, *yaml("stage1", *options)).communicate()
    pretrained, vit = printed(output)[-2:]
    run(yaml("stage2", pretrained, vit, TARGET, *SHORT))
    saved = OmegaConf.load(tmp_path / "stage2" / "config.yaml")
    assert saved.datasets.coco_caption.vis_processor.train.image_size == 16
    export = printed(capsys.readouterr().out)
    assert main(export[1:]) == 0
    folder = Path(export[-1])
    shutil.rmtree(tmp_path / "vision")
    capsys.readouterr()
    assert main(["tokenize", str(CAT), "--model", str(folder)]) == 0
    assert sum(code.isdigit() for code in capsys.readouterr().out.split()) >= 32

    # 2. A decoder of its embeddings; stable unCLIP's are those of CLIP.
    parts = write_seed_decoder_parts(tmp_path / "parts")
    settings = seed_decoder_config(
        parts,
        tmp_path / "run",
        denoiser="SanaTransformer2DModel",
        model={"tokenizer": str(folder), "reads": "embedding"},
        data={"encoder_size": 16},
        trainer={"max_steps": 2, "save_steps": 0},
    )
    decoder = SeedDecoderTask.train(settings)["decoder"]
    shutil.rmtree(folder / "diffusion_model", ignore_errors=True)
    shutil.copytree(decoder, folder / "diffusion_model")
    out = tmp_path / "cat.png"
    rebuild = ["reconstruct", str(CAT), "--model", str(folder), "--out", str(out), "--steps", "2"]
    assert main(rebuild) == 0
    assert Image.open(out).size == (16, 16)

    # 3. Evaluation: cosines to the encoder's own feature.
    evaluation = ["eval", "tokenizer", "--model", str(folder), "--out", str(tmp_path / "eval")]
    evaluation += ["--data", str(images / "pairs.json"), "--limit", "4", "--rebuild", "2"]
    assert main([*evaluation, "--clip", str(tmp_path)]) == 2
    assert "--clip" in capsys.readouterr().err
    assert main(evaluation) == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())["reconstruction"]
    assert (report["embedding"]["n"], report["image_clip"]["n"]) == (4, 2)
