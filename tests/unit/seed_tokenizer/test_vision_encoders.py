"""Runs with vision encoders of transformers: from images to codes, by the printed commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import warm_python
from lavis_runs import APPLICATION, log_of, printed
from omegaconf import OmegaConf
from PIL import Image
from repository import ROOT
from tiny.training import seed_decoder_config, write_seed_decoder_parts
from tiny.vision import KINDS, write_vision

TARGET = "model.alignment_target=encoder"
SHORT = ("run.max_epoch=1", "run.iters_per_epoch=2")
CAT = ROOT / "images" / "cat.jpg"


def vit_option(folder: Path) -> str:
    return f"model.vit={{type: hub, path: {folder}}}"


@pytest.mark.process
def test_tokenizer_of_siglip2_by_the_printed_commands(yaml, start, run, tmp_path, capsys):
    """Both stages, the first as a process, export, codes of an image; sizes of EVA in the YAML are
    replaced, and the size of its images is the encoder's."""
    from seed_multimodal.cli.main import main

    write_vision("siglip2", tmp_path / "vision")
    options = [vit_option(tmp_path / "vision"), "model.freeze_vit=True", *SHORT]
    program = str(APPLICATION / "train.py")
    process = start(warm_python.PYTHON, program, *yaml("stage1", *options))
    out, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    pretrained, vit = printed(out)[-2:]
    assert vit.startswith("model.vit=")
    run(yaml("stage2", pretrained, vit, *SHORT))
    export = printed(capsys.readouterr().out)
    assert main(export[1:]) == 0
    capsys.readouterr()
    assert main(["tokenize", str(CAT), "--model", export[-1]]) == 0
    assert sum(code.isdigit() for code in capsys.readouterr().out.split()) >= 32
    saved = OmegaConf.load(tmp_path / "stage2" / "config.yaml")
    assert saved.datasets.coco_caption.vis_processor.train.image_size == 16
    assert "patch_size" not in saved.model.vit


def test_load_config_prepares_images_for_the_encoder(tmp_path):
    """Shorter side and centre crop of DINOv2, also in evaluation, whatever the YAML says."""
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


@pytest.mark.parametrize("kind", ["siglip2", "dinov2", "dinov3", "clip"])
def test_train_towards_the_encoders_own_feature(kind, yaml, run, tmp_path):
    """Both stages of encoders with a pooling head, a class token or registers; bf16 the second."""
    network = write_vision(kind, tmp_path / "vision")
    vit = vit_option(tmp_path / "vision")
    run(yaml("stage1", vit, "model.freeze_vit=True", *SHORT))
    start = f"model.pretrained={tmp_path}/stage1/checkpoint_0.pth"
    options = [vit, TARGET, "model.vit_precision=bf16", *SHORT]
    model = run(yaml("stage2", start, *options)).model
    assert model.clip_model is None and model.config.image_features_dim == 16
    assert len(log_of(tmp_path / "stage2", "stage2")) == 2

    encoder = model.visual_encoder
    assert encoder.n_class_tokens == KINDS[kind][-1]
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
    """Stage 1 trains SigLIP and reads its feature from the queries; stage 2 gets all of it."""
    write_vision("siglip", tmp_path / "vision")
    vit = vit_option(tmp_path / "vision")
    trained = ["model.freeze_vit=False", "model.embedding_weight=2.0", "model.vit_precision=fp32"]
    model = run(yaml("stage1", vit, TARGET, *trained, *SHORT)).model
    line = log_of(tmp_path / "stage1", "stage1")[1]
    assert line["loss"] == pytest.approx(line["loss_itc"] + 2 * line["loss_embedding"], rel=1e-5)
    assert model.skips_parameters
    start = f"model.pretrained={tmp_path}/stage1/checkpoint_0.pth"
    second = run(yaml("stage2", start, vit, TARGET, *SHORT)).model
    expected = model.visual_encoder.state_dict()
    assert any("head" in name for name in expected)
    for name, tensor in second.visual_encoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_decoder_of_the_encoders_own_feature(yaml, run, images, tmp_path, capsys):
    """Stage 2 with the encoder's target, export, evaluation, a decoder's training, an image."""
    from seed_multimodal.cli.main import main
    from seed_multimodal.models.seed.modeling import Seed2Tokenizer
    from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask

    # 1. The tokenizer; without its folder the encoder still gives the target.
    write_vision("siglip", tmp_path / "vision")
    random = ["model.load_pretrained=False", "model.freeze_qformer=False"]
    run(yaml("stage2", vit_option(tmp_path / "vision"), TARGET, *random, *SHORT))
    checkpoint = tmp_path / "stage2" / "checkpoint_0.pth"
    folder = tmp_path / "tokenizer"
    assert main(["export-tokenizer", "--stage2", str(checkpoint), "--out", str(folder)]) == 0
    shutil.rmtree(tmp_path / "vision")
    sizes = Seed2Tokenizer.from_pretrained(folder).config
    assert (sizes.alignment_target, sizes.image_features_dim) == ("encoder", 16)

    # 2. A decoder of its embeddings; stable unCLIP's are those of CLIP.
    parts = write_seed_decoder_parts(tmp_path / "parts")
    model = {"tokenizer": str(folder), "reads": "embedding"}
    settings = seed_decoder_config(
        parts,
        tmp_path / "run",
        denoiser="SanaTransformer2DModel",
        model=model,
        data={"encoder_size": 16},
        trainer={"max_steps": 2, "save_steps": 0},
    )
    SeedDecoderTask.train(settings)
    (folder / "diffusion_model" / "unet").mkdir(parents=True)
    rebuild = ["reconstruct", str(CAT), "--model", str(folder), "--out", str(tmp_path / "cat.png")]
    assert main(rebuild) == 2
    assert "train a decoder of its embeddings" in capsys.readouterr().err
    shutil.rmtree(folder / "diffusion_model")
    shutil.copytree(tmp_path / "run" / "decoder", folder / "diffusion_model")
    assert main([*rebuild, "--steps", "2"]) == 0
    assert Image.open(tmp_path / "cat.png").size == (16, 16)

    # 3. Evaluation: cosines to the encoder's own feature.
    evaluation = ["eval", "tokenizer", "--model", str(folder), "--out", str(tmp_path / "eval")]
    evaluation += ["--data", str(images / "pairs.json"), "--limit", "4", "--rebuild", "2"]
    assert main([*evaluation, "--clip", str(tmp_path)]) == 2
    assert "leave out --clip" in capsys.readouterr().err
    assert main(evaluation) == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())["reconstruction"]
    assert report["clip"] == "the tokenizer's vision encoder"
    assert report["embedding"]["n"] == 4 and report["image_clip"]["n"] == 2
