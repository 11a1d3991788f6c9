"""LaVIT's tokenizer with vision encoders of transformers: stage 1, export, system, stage 2."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import spread
from tiny.language import LLM_WIDTH
from tiny.lavit import DECODER, SIDE, TOKENIZER, write_language, write_pixels
from tiny.vision import KINDS, write_vision
from torch import Tensor

from seed_multimodal.compat.lavit import LaVITforUnderstanding
from seed_multimodal.models.lavit.checkpoints import (
    load_dynamic_tokenizer,
    save_dynamic_tokenizer,
    visual_weight_state,
)
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.export import Stage1Sizes, export_stage1
from seed_multimodal.models.lavit.losses import LavitStage1
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.lavit.train_pixels import image_codes
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.training.checkpoint import frozen_names
from seed_multimodal.weights import fingerprint, save_state_dict

PATCHES = 4
IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 44, 3), np.uint8))
ENCODERS = ["siglip2", "dinov2", "dinov3", "clip"]


def sizes_of(vision: Path) -> LavitTokenizerConfig:
    vit = HubVisionConfig(path=str(vision))
    return dataclasses.replace(TOKENIZER, vit=vit, vit_head=0, merger_mlp_width=24)


def stage1_of(vision: Path) -> LavitStage1:
    """At its start, with the weights of the vision encoder."""
    torch.manual_seed(0)
    tokenizer = DynamicTokenizer(sizes_of(vision))
    for name, parameter in tokenizer.named_parameters():
        if parameter.ndim > 1 and not name.startswith("encoder."):
            torch.nn.init.normal_(parameter, std=0.3)
    decoder_sizes = dataclasses.replace(
        DECODER, tokens=tokenizer.n_patches, feature_dim=tokenizer.encoder.width
    )
    load_vision(tokenizer.encoder, vision, None)
    return LavitStage1(tokenizer, CodeDecoder(decoder_sizes))


def save(model: LavitStage1, folder: Path) -> Path:
    """Without frozen parameters, and with its sizes, as a run saves it."""
    model.quantize.embedding.weight.requires_grad_(True)  # by moving averages
    state = model.state_dict()
    for name in frozen_names(model):
        del state[name]
    save_state_dict(state, folder / "checkpoint.safetensors")
    tower = tuple(fingerprint(model.tokenizer.encoder))
    sizes = Stage1Sizes(model.tokenizer.config, model.decoder.config, tower)
    (folder / "config.json").write_text(json.dumps(sizes.to_dict()))
    return folder / "checkpoint.safetensors"


def equal(rows: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(row, other) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("kind", ENCODERS)
def test_stage1_and_system_of_another_vision_encoder(kind, tmp_path):
    network = write_vision(kind, tmp_path / "vision")
    model = stage1_of(tmp_path / "vision")
    tokenizer = model.tokenizer
    preprocessing = tokenizer.transform
    pixels = preprocessing(IMAGE)[None]
    assert preprocessing == tokenizer.config.vit.preprocessing
    assert (tokenizer.n_patches, tokenizer.encoder.n_class_tokens) == (PATCHES, KINDS[kind][-1])

    # 1. The target are the encoder's own features of the patches.
    features = model.patch_features(pixels)
    assert features.shape == (1, PATCHES, 16)
    if kind != "siglip2":  # which reads patches, see test_vision_hub.py
        with torch.no_grad():
            expected = network(pixel_values=pixels).last_hidden_state[:, -PATCHES:]
        torch.testing.assert_close(features, expected)

    # 2. Training, without codes and with them.
    batch = torch.cat([pixels, torch.randn(7, 3, 16, 16)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    before = fingerprint(tokenizer.encoder)
    for step in range(6):
        loss = model(batch, quantize=step > 2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert fingerprint(tokenizer.encoder) == before
    model.eval()
    expected_codes = tokenizer.encode(batch, mode="threshold")

    # 3. The exported folder needs the encoder's folder no more.
    checkpoint = save(model, tmp_path)
    exported, _ = export_stage1(checkpoint, tmp_path / "system")
    shutil.rmtree(tmp_path / "vision")
    loaded = load_dynamic_tokenizer(exported)
    assert equal(loaded.encode(batch, mode="threshold"), expected_codes)
    half = load_dynamic_tokenizer(exported, dtype=torch.bfloat16)
    assert half.patch_features(batch).dtype == torch.float32

    # 4. Pixel decoders are trained with the codes that are served.
    read = preprocessing.read(IMAGE)[None]
    codes = image_codes(loaded, read, "threshold")
    assert codes.shape == (1, PATCHES)
    assert codes[codes >= 0].tolist() == expected_codes[0].tolist()

    # 5. A system with a token merger of stage 2.
    folder = tmp_path / "system"
    text_tokenizer = write_language(folder / "llm", 0, PATCHES)
    torch.manual_seed(1)
    second = DynamicTokenizer(dataclasses.replace(loaded.config, llm_width=LLM_WIDTH))
    save_state_dict(visual_weight_state(second), exported / "visual_weight.safetensors")
    write_pixels(folder / "pixels")
    drawing = {"max_new_tokens": PATCHES, "min_new_tokens": 1}
    settings = {"system": "lavit", "selection": "threshold", "generation": {"draw": drawing}}
    (folder / "system.json").write_text(json.dumps(settings))
    system = Lavit.from_pretrained(folder, device="cpu", dtype="float32", log=None)
    assert system.tokenize([IMAGE])[0].tolist() == expected_codes[0].tolist()
    assert system.images.kept_patches([IMAGE])[0].shape == (2, 2)
    assert isinstance(system.describe(IMAGE, max_new_tokens=4), str)
    image = system.draw("a red apple")
    assert image.size == (SIDE, SIDE)
    assert text_tokenizer.vocabulary.tokens_per_image == PATCHES


@pytest.mark.parametrize("kind", ["siglip2", "dinov2"])
def test_pixels_of_the_original_class_are_those_of_the_encoder(kind, tmp_path):
    """`generate` turns pixels back to images with the encoder's mean, and does not crop again."""
    write_vision(kind, tmp_path / "vision")
    tokenizer = spread(DynamicTokenizer(sizes_of(tmp_path / "vision"))).eval()
    load_vision(tokenizer.encoder, tmp_path / "vision", None)
    save_dynamic_tokenizer(tokenizer, tmp_path / "tokenizer")
    write_language(tmp_path / "llm", 0, PATCHES)
    settings = {"system": "lavit", "selection": "threshold"}
    (tmp_path / "system.json").write_text(json.dumps(settings))
    model = LaVITforUnderstanding(model_path=tmp_path, model_dtype="fp32")
    images = [IMAGE, IMAGE.rotate(90), Image.new("RGB", (20, 20), "red")]
    pixels = tokenizer.transform.batch(images)
    options = {"num_beams": 1, "max_length": 8, "min_length": 8}
    answers = model.generate({"image": images}, **options)
    assert model.generate({"image": pixels}, **options) == answers
    assert len(set(answers)) == 3
