"""Runs with vision encoders of transformers: from images to codes, by the printed commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import warm_python
from lavis_runs import APPLICATION, log_of, printed
from omegaconf import OmegaConf
from repository import ROOT
from tiny_vision import KINDS, write_vision

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


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip"])
def test_train_both_stages(kind, yaml, run, tmp_path):
    """Of encoders with a class token or registers; in bf16 the second."""
    network = write_vision(kind, tmp_path / "vision")
    vit = vit_option(tmp_path / "vision")
    run(yaml("stage1", vit, "model.freeze_vit=True", *SHORT))
    start = f"model.pretrained={tmp_path}/stage1/checkpoint_0.pth"
    model = run(yaml("stage2", start, vit, "model.vit_precision=bf16", *SHORT)).model
    encoder = model.visual_encoder
    assert encoder.n_class_tokens == KINDS[kind][-1]
    assert any(weight.dtype == torch.bfloat16 for weight in encoder.parameters())
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(pixel_values=pixels).last_hidden_state
        features = model.encode_vision(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0.1, atol=0.1)
    assert len(log_of(tmp_path / "stage2", "stage2")) == 2
