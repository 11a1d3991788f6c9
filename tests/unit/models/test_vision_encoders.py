"""Tokenizers of SEED and LaVIT with vision encoders of transformers: from training to codes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_images import noise
from tiny import spread
from tiny.lavit import DECODER, TOKENIZER, write_language
from tiny.seed import SIZES, loud
from tiny.vision import KINDS, write_vision
from torch import Tensor, nn

from seed_multimodal.data.pretokenize.encode import Encoder, read_transform
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.models.lavit.checkpoints import (
    load_dynamic_tokenizer,
    save_dynamic_tokenizer,
)
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.export import Stage1Sizes, export_stage1
from seed_multimodal.models.lavit.losses import LavitStage1
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.train_pixels import image_codes
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.models.seed.export import export_tokenizer
from seed_multimodal.models.seed.losses import Stage1Model, Stage2Model
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.pipelines.images import open_images
from seed_multimodal.training.checkpoint import frozen_names
from seed_multimodal.weights import fingerprint, save_state_dict

IMAGE = noise(1, (44, 30))  # no square, so that squashing and cropping differ
PATCHES = 4


def train(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """A few steps, which leave the encoder as it is."""
    encoder = next(part for name, part in model.named_modules() if name.endswith("encoder"))
    before = fingerprint(encoder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert value.isfinite()
    assert fingerprint(encoder) == before


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Without frozen parameters, as a run saves it."""
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


@pytest.mark.parametrize("kind", KINDS)
def test_seed_tokenizer_of_another_vision_encoder(kind, tmp_path):
    vision = tmp_path / "vision"
    write_vision(kind, vision)
    vit = HubVisionConfig(path=str(vision))
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)

    # 1. Both stages, on uint8 of the data workers, normalised for the encoder.
    preprocessing = vit.preprocessing
    pixels = preprocessing.normalise(preprocessing.read(IMAGE))[None]
    torch.manual_seed(0)
    batch = torch.cat([pixels, torch.randn(3, 3, 16, 16)])
    ids = torch.randint(3, 30, (4, 6))
    first = loud(Stage1Model(config, vocab_size=40, embed_dim=8))
    load_vision(first.visual_encoder, vision, None)
    train(first, lambda: first(batch, ids).loss)
    second = loud(Stage2Model(config))
    second.load_stage1(first.state_dict())
    with torch.no_grad():
        # Rows of the codebook at the features of the image, so that its codes differ.
        second.quantize.embedding.weight[: config.num_query] = second.eval().pre_quant(pixels)[0]
    target = torch.randn(4, 10)
    train(second.train(), lambda: second(batch, target).loss)
    codes = second.eval().encode(pixels)
    assert len(codes.unique()) > 4

    # 2. The exported folder needs the encoder's folder no more.
    files = [tmp_path / f"stage{stage}.pth" for stage in (1, 2)]
    for model, file in zip((first, second), files, strict=True):
        torch.save({"model": trained_state(model)}, file)
    out = tmp_path / "tokenizer"
    export_tokenizer(files[1], out, stage1=files[0], config=config)
    shutil.rmtree(vision)

    # 3. Serving and pre-tokenising see the same pixels and give the same codes.
    codec = open_images(out, device="cpu", dtype="float32")
    assert torch.equal(codec.pixels([IMAGE]), pixels)
    assert torch.equal(codec.encode([IMAGE]), codes)
    half = open_images(out, device="cpu", dtype="bfloat16").encode([IMAGE])
    assert (half == codes).float().mean() > 0.6
    encoder = Encoder(str(out), "cpu", "auto", compile=False)
    read = encoder.transform.read(IMAGE)
    assert torch.equal(encoder.transform.normalise(read)[None], pixels)
    assert encoder(read[None]) == codes.tolist()


def lavit_sizes(vision: Path) -> LavitTokenizerConfig:
    vit = HubVisionConfig(path=str(vision))
    return dataclasses.replace(TOKENIZER, vit=vit, vit_head=0, merger_mlp_width=24)


def equal(rows: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(row, other) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("kind", ["siglip2", "dinov2", "dinov3", "clip"])
def test_lavit_tokenizer_of_another_vision_encoder(kind, tmp_path):
    network = write_vision(kind, tmp_path / "vision")
    torch.manual_seed(0)
    tokenizer = spread(DynamicTokenizer(lavit_sizes(tmp_path / "vision")))
    load_vision(tokenizer.encoder, tmp_path / "vision", None)
    width = tokenizer.encoder.width
    decoder = CodeDecoder(dataclasses.replace(DECODER, tokens=PATCHES, feature_dim=width))
    model = LavitStage1(tokenizer, decoder)
    pixels = tokenizer.transform(IMAGE)[None]
    assert (tokenizer.n_patches, tokenizer.encoder.n_class_tokens) == (PATCHES, KINDS[kind][-1])

    # 1. The targets are the encoder's own features of the patches.
    features = model.patch_features(pixels)
    if kind != "siglip2":  # which reads patches, see test_vision_hub.py
        with torch.no_grad():
            expected = network(pixel_values=pixels).last_hidden_state[:, -PATCHES:]
        torch.testing.assert_close(features, expected)

    # 2. Training with codes, and the export, which needs the encoder's folder no more.
    batch = torch.cat([pixels, torch.randn(7, 3, 16, 16)])
    train(model, lambda: model(batch, quantize=True).loss)
    codes = model.eval().tokenizer.encode(batch, mode="threshold")
    model.quantize.embedding.weight.requires_grad_(True)  # by moving averages
    save_state_dict(trained_state(model), tmp_path / "checkpoint.safetensors")
    sizes = Stage1Sizes(tokenizer.config, decoder.config, tuple(fingerprint(tokenizer.encoder)))
    (tmp_path / "config.json").write_text(json.dumps(sizes.to_dict()))
    exported, _ = export_stage1(tmp_path / "checkpoint.safetensors", tmp_path / "out")
    shutil.rmtree(tmp_path / "vision")
    loaded = load_dynamic_tokenizer(exported)
    assert equal(loaded.encode(batch, mode="threshold"), codes)

    # 3. Pixel decoders are trained with the codes that are served.
    read = loaded.transform.read(IMAGE)[None]
    served = image_codes(loaded, read, "threshold")
    assert served[served >= 0].tolist() == codes[0].tolist()


def test_pixels_of_lavits_original_class_are_those_of_the_encoder(tmp_path):
    # `generate` turns pixels back to images with the encoder's mean, and does not crop again.
    from seed_multimodal.compat.lavit import LaVITforUnderstanding

    write_vision("dinov2", tmp_path / "vision")
    tokenizer = spread(DynamicTokenizer(lavit_sizes(tmp_path / "vision"))).eval()
    load_vision(tokenizer.encoder, tmp_path / "vision", None)
    save_dynamic_tokenizer(tokenizer, tmp_path / "tokenizer")
    write_language(tmp_path / "llm", 0, PATCHES)
    settings = {"system": "lavit", "selection": "threshold"}
    (tmp_path / "system.json").write_text(json.dumps(settings))
    model: Any = LaVITforUnderstanding(model_path=tmp_path, model_dtype="fp32")
    images = [IMAGE, noise(2), noise(3, (20, 20))]
    options = {"num_beams": 1, "max_length": 8, "min_length": 8}
    answers = model.generate({"image": images}, **options)
    assert len(set(answers)) == 3
    pixels = tokenizer.transform.batch(images)
    assert model.generate({"image": pixels}, **options) == answers


def test_image_transform_keeps_the_encoders_mean(tmp_path):
    write_vision("siglip", tmp_path)
    default = HubVisionConfig(path=str(tmp_path)).preprocessing
    yaml = tmp_path / "transform.yaml"
    yaml.write_text(
        "_target_: seed_multimodal.images.transforms.get_transform\n"
        "type: clip\nkeep_ratio: true\nimage_size: 16\n"
    )
    assert read_transform(yaml, default) == dataclasses.replace(default, keep_ratio=True)

    # A processor's mean must be the encoder's: CLIP's is refused, its own is not.
    yaml.write_text(
        "_target_: transformers.CLIPImageProcessor.from_pretrained\n"
        f"pretrained_model_name_or_path: {tmp_path}\n"
    )
    assert read_transform(yaml, default) == default
    with pytest.raises(ConfigError, match=r"\[0\.5, 0\.5, 0\.5\]"):
        read_transform(yaml, seed_image_processor(16))


@torch.no_grad()
def test_stage2_gives_the_target_clip_its_own_pixels(tmp_path):
    # Of another mean and size than the encoder's.
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    write_vision("siglip", tmp_path)
    vit = HubVisionConfig(path=str(tmp_path))
    sizes = {**KINDS["clip"][2], "image_size": 24}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=10)).eval()
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)
    model = Stage2Model(config, clip_model=clip)
    grey = torch.full((1, 3, 16, 16), 120, dtype=torch.uint8)
    target = model.target_of(vit.preprocessing.normalise(grey))
    grey = torch.full((1, 3, 24, 24), 120, dtype=torch.uint8)
    expected = clip(ImageTransform(24).normalise(grey)).image_embeds
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
