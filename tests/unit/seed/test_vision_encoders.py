"""SEED with vision encoders of transformers: both stages, export, serving, pre-tokenising."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.seed import SIZES, loud
from tiny.vision import KINDS, write_vision
from torch import Tensor, nn

from seed_multimodal.data.pretokenize.encode import Encoder, read_transform
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.export import export_tokenizer
from seed_multimodal.models.seed.losses import Stage1Model, Stage2Model
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.pipelines.images import open_images
from seed_multimodal.training.checkpoint import frozen_names


def _image(folder: Path) -> Path:
    """A JPEG-free image that is no square, so that squashing and cropping differ."""
    pixels = np.random.default_rng(1).integers(0, 256, (30, 44, 3), np.uint8)
    file = folder / "image.png"
    Image.fromarray(pixels).save(file)
    return file


def _steps(model: nn.Module, loss: Any, n: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(n):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def _save(model: nn.Module, file: Path) -> Path:
    """Without frozen parameters, as a run saves it."""
    state = model.state_dict()
    for name in frozen_names(model):
        state.pop(name, None)
    torch.save({"model": state}, file)
    return file


def _train(config: Seed2Config, vision: Path, folder: Path, pixels: Tensor) -> Stage2Model:
    """Both stages for a few steps; their checkpoints are in the folder."""
    torch.manual_seed(0)
    batch = torch.cat([pixels, torch.randn(3, 3, 16, 16)])
    ids = torch.randint(3, 30, (4, 6))
    first = loud(Stage1Model(config, vocab_size=40, embed_dim=8))
    load_vision(first.visual_encoder, vision, None)
    assert all(np.isfinite(_steps(first, lambda: first(batch, ids).loss)))
    _save(first, folder / "stage1.pth")

    second = loud(Stage2Model(config))
    second.load_stage1(first.state_dict())
    with torch.no_grad():
        # Rows of the codebook at the features of the image, so that its codes differ.
        second.quantize.embedding.weight[: config.num_query] = second.eval().pre_quant(pixels)[0]
    second.train()
    target = torch.randn(4, config.image_features_dim)
    assert all(np.isfinite(_steps(second, lambda: second(batch, target).loss)))
    _save(second, folder / "stage2.pth")
    return second.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_another_vision_encoder(kind, tmp_path):
    write_vision(kind, tmp_path / "vision")
    vit = HubVisionConfig(path=str(tmp_path / "vision"))
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)
    image = _image(tmp_path)

    # 1. Training: uint8 of the data workers, normalised for the encoder.
    preprocessing = vit.preprocessing
    pixels = preprocessing.normalise(preprocessing.read(image))[None]
    trained = _train(config, tmp_path / "vision", tmp_path, pixels)
    expected = trained.encode(pixels)
    assert len(set(expected[0].tolist())) > 4

    # 2. The exported folder needs the encoder's folder no more.
    out = tmp_path / "tokenizer"
    export_tokenizer(
        tmp_path / "stage2.pth", out, stage1=tmp_path / "stage1.pth", config=config, image=image
    )
    shutil.rmtree(tmp_path / "vision")

    settings = SeedLlamaConfig.settings_of_weights({"tokenizer": out})
    assert settings["image_size"] == preprocessing.image_size

    # 3. Serving and pre-tokenising see the same pixels and give the same codes.
    codec = open_images(out, device="cpu", dtype="float32")
    assert torch.equal(codec.pixels([image]), pixels)
    assert torch.equal(codec.encode([image]), expected)
    half = open_images(out, device="cpu", dtype="bfloat16").encode([image])
    assert (half == expected).float().mean() > 0.6
    encoder = Encoder(str(out), "cpu", "auto", compile=False)
    read = encoder.transform.read(image)
    assert torch.equal(encoder.transform.normalise(read)[None], pixels)
    assert encoder(read[None]) == expected.tolist()


def test_image_transform_keeps_the_encoders_mean(tmp_path):
    write_vision("siglip", tmp_path)
    default = HubVisionConfig(path=str(tmp_path)).preprocessing
    yaml = tmp_path / "transform.yaml"
    yaml.write_text(
        "_target_: seed_multimodal.images.transforms.get_transform\n"
        "type: clip\nkeep_ratio: true\nimage_size: 16\n"
    )
    transform = read_transform(yaml, default)
    assert transform == dataclasses.replace(default, keep_ratio=True)

    # A processor's mean must be the encoder's: CLIP's is refused, its own is not.
    yaml.write_text(
        "_target_: transformers.CLIPImageProcessor.from_pretrained\n"
        f"pretrained_model_name_or_path: {tmp_path}\n"
    )
    assert read_transform(yaml, default) == default
    with pytest.raises(ConfigError, match=r"normalizes with \[0\.5, 0\.5, 0\.5\].* expects"):
        read_transform(yaml, seed_image_processor(16))


def test_stage2_gives_the_target_clip_its_own_pixels(tmp_path):
    """Of another mean and size than the encoder's."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    write_vision("siglip", tmp_path)
    vit = HubVisionConfig(path=str(tmp_path))
    sizes = {**KINDS["clip"][2], "image_size": 24}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=10))
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)
    model = Stage2Model(config, clip_model=clip.eval())
    clip.eval()
    flat = torch.full((1, 3, 16, 16), 120, dtype=torch.uint8)
    target = model.target_of(vit.preprocessing.normalise(flat))
    flat = torch.full((1, 3, 24, 24), 120, dtype=torch.uint8)
    with torch.no_grad():
        expected = clip(ImageTransform(24).normalise(flat)).image_embeds
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
