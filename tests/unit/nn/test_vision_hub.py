"""Vision models of transformers as vision encoders."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.vision import KINDS, write_vision

from seed_multimodal.errors import CheckpointError, ConfigError, ImageError
from seed_multimodal.images.transforms import CLIP_MEAN, read_preprocessing, seed_image_processor
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.nn.vision.qwen import QwenEncoderConfig, QwenVit
from seed_multimodal.nn.vision.registry import (
    build_vision_encoder,
    load_vision_encoder,
    read_vision_config,
)


@pytest.mark.parametrize("kind", KINDS)
def test_load_vision_encoder_computes_the_models_features(kind, tmp_path):
    model = write_vision(kind, tmp_path)
    encoder = load_vision_encoder(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    pixels = encoder.preprocessing(image)[None]
    with torch.no_grad():
        features = encoder(pixels)
        if kind == "siglip2":
            from transformers import Siglip2ImageProcessor

            # The processor's patches of the same pixels: already resized and normalised.
            processor = Siglip2ImageProcessor(
                patch_size=8, max_num_patches=4, do_resize=False, do_rescale=False
            )
            inputs = processor(pixels[0] / 2 + 0.5, do_normalize=False, return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"] * 2 - 1
            expected = model(**inputs).last_hidden_state
        else:
            expected = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features, expected)
    assert features.shape == (1, encoder.n_tokens, encoder.width)
    assert (encoder.image_size, encoder.n_class_tokens) == (16, KINDS[kind][-1])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov3", "clip"])
def test_preprocessing_makes_the_pixels_of_transformers(kind, tmp_path):
    from transformers import AutoImageProcessor

    write_vision(kind, tmp_path)
    processor_type = {
        "siglip": "SiglipImageProcessor",
        "dinov2": "BitImageProcessor",
        "dinov3": "ViTImageProcessor",
        "clip": "CLIPImageProcessor",
    }[kind]
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "image_processor_type": processor_type}))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.linear_gradient("L").convert("RGB").resize((48, 32))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    pixels = read_preprocessing(tmp_path)(image)
    # Of tensors torch resizes, of images Pillow: a few grey levels.
    torch.testing.assert_close(pixels, torch.as_tensor(expected), atol=0.06, rtol=0)


def test_patches_of_a_network_that_merges_them(tmp_path):
    from transformers import SwinConfig

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    values = {**config.to_dict(), "window_size": 4}
    encoder = build_vision_encoder(
        {"type": "hub", "network": values, "preprocessing": {"image_size": 32}}
    )
    pixels = torch.randn(1, 3, 32, 32)
    assert (encoder.n_class_tokens, encoder.n_patches) == (0, 16)
    assert encoder.patch_features(pixels).shape == (1, 16, encoder.width)


def test_hub_config_is_self_contained(tmp_path):
    write_vision("dinov3", tmp_path / "dino")
    config = HubVisionConfig(path=str(tmp_path / "dino"))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "dino").rename(tmp_path / "elsewhere")
    again = read_vision_config(values, "vit")
    assert again == config
    assert build_vision_encoder(values).n_tokens == 7


def test_hub_vision_on_the_meta_device_gets_its_buffers_back(tmp_path):
    """Rotary frequencies are in no checkpoint."""
    from seed_multimodal.nn.pretrained import fill_buffers
    from seed_multimodal.weights import assign_strictly

    write_vision("dinov3", tmp_path)
    encoder = load_vision_encoder(tmp_path)
    with torch.device("meta"):
        again = HubVisionConfig(path=str(tmp_path)).build()
    assign_strictly(again, encoder.state_dict(), "the encoder")
    fill_buffers(again, "cpu")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(pixels), encoder(pixels))


def test_one_half_of_a_whole_siglip(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    sizes = {**KINDS["siglip"][2]}
    text = {key: value for key, value in sizes.items() if key not in ("image_size", "patch_size")}
    config = SiglipConfig(text_config={**text, "vocab_size": 30}, vision_config=sizes)
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(KINDS["siglip"][3]))
    encoder = load_vision_encoder(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(encoder(pixels), expected)


def test_vision_config_by_type():
    eva = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 24}
    assert read_vision_config(eva, "vit") == EvaConfig(**eva)
    assert isinstance(build_vision_encoder({"type": "eva", **eva}), EvaVit)
    qwen = QwenEncoderConfig(
        image_size=28, patch_size=14, width=16, layers=1, heads=2, output_dim=24, n_queries=4
    )
    assert isinstance(build_vision_encoder(dataclasses.asdict(qwen)), QwenVit)
    assert qwen.preprocessing == seed_image_processor(28)
    assert EvaConfig().preprocessing.mean == CLIP_MEAN


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "hup"}, r"'hup' is no vision encoder \(did you mean 'hub'\?\)"),
        ({"type": "hub"}, "needs `path`, or `network` and `preprocessing`"),
        ({"widht": 3}, "vit: unknown key 'widht'"),
        ({"width": 0}, "width must be at least 1"),
        ({"type": "hub", "path": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_vision_config_of_wrong_values(values, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_vision_config(values, "vit")


def test_load_vision_encoder_of_wrong_folders(tmp_path):
    model = write_vision("siglip", tmp_path / "siglip")
    encoder = load_vision_encoder(tmp_path / "siglip")
    with pytest.raises(ImageError, match="reads images of 16 x 16 pixels, not 24 x 24"):
        encoder(torch.zeros(1, 3, 24, 24))

    state = model.state_dict()
    del state["embeddings.patch_embedding.bias"]
    model.save_pretrained(tmp_path / "siglip", state_dict=state)
    with pytest.raises(CheckpointError, match="1 tensors are missing from the file: '.*patch_e"):
        load_vision_encoder(tmp_path / "siglip")

    (tmp_path / "siglip" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: no such file; put that"):
        load_vision_encoder(tmp_path / "siglip")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ConfigError, match="other: no transformers model"):
        load_vision_encoder(tmp_path / "other")
