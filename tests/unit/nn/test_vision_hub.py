"""Vision models of transformers as vision encoders: their features, pixels and configurations."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from random_images import noise
from tensors import normal
from tiny import read_json, write_json
from tiny.vision import KINDS, write_vision
from torch.testing import assert_close

from seed_multimodal.errors import CheckpointError, ConfigError, ImageError
from seed_multimodal.images.transforms import read_preprocessing
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.base import VisionEncoder
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.nn.vision.registry import read_vision_config

PIXELS = normal(0, 2, 3, 16, 16)


def load_hub_vision(folder) -> VisionEncoder:
    encoder = read_vision_config({"type": "hub", "path": str(folder)}, "vit").build()
    load_vision(encoder, folder, log=None)
    return encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hub_vision_computes_the_models_features(kind, tmp_path):
    # Each publisher has other patches, class tokens and pooling.
    model = write_vision(kind, tmp_path)
    encoder = load_hub_vision(tmp_path)
    pixels = encoder.preprocessing(noise(0))[None]
    inputs = {"pixel_values": pixels}
    if kind == "siglip2":
        from transformers import Siglip2ImageProcessor

        # The processor's patches of the same pixels: already resized and normalised.
        processor = Siglip2ImageProcessor(
            patch_size=8, max_num_patches=4, do_resize=False, do_rescale=False
        )
        inputs = processor(pixels[0] / 2 + 0.5, do_normalize=False, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"] * 2 - 1
    features = encoder(pixels)
    assert_close(features, model(**inputs).last_hidden_state)
    assert features.shape == (1, encoder.n_tokens, encoder.width)
    assert (encoder.image_size, encoder.n_class_tokens) == (16, KINDS[kind]["class_tokens"])


PROCESSORS = {
    "siglip": "SiglipImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3": "ViTImageProcessor",
    "clip": "CLIPImageProcessor",
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_makes_the_pixels_of_transformers(kind, tmp_path):
    from transformers import AutoImageProcessor

    write_vision(kind, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = read_json(file)
    write_json(file, {**values, "image_processor_type": PROCESSORS[kind]})
    image = Image.linear_gradient("L").convert("RGB").resize((48, 32))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    # Of tensors torch resizes, of images Pillow: a few grey levels.
    pixels = read_preprocessing(tmp_path)(image)
    assert_close(pixels, torch.as_tensor(expected), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 9}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"size": "large"}, "size"),
        ({"size": -1}, "size"),
        ({"size": {"longest_edge": 64}}, "size"),
        ({"size": {"height": 64, "width": 32}}, "size"),
    ],
)
def test_preprocessing_that_is_not_followed_is_refused(values, named, tmp_path):
    write_json(tmp_path / "preprocessor_config.json", {"size": 32, **values})
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {named}"):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize("name", ["ViTImageProcessor", "CLIPImageProcessor"])
def test_one_number_has_the_meaning_of_its_class(name, tmp_path):
    from transformers import AutoImageProcessor

    values = {"size": 32, "crop_size": None, "do_convert_rgb": None, "image_processor_type": name}
    if name == "CLIPImageProcessor":
        values["crop_size"] = 32
    write_json(tmp_path / "preprocessor_config.json", values)
    image = Image.linear_gradient("L").convert("RGB").resize((64, 40))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    keys = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    transform = dataclasses.replace(read_preprocessing(tmp_path), **keys)
    assert_close(transform(image), torch.as_tensor(expected), atol=0.1, rtol=0)


def test_patches_of_a_network_that_merges_them():
    # Swin has fewer patches at its end than at its beginning.
    from transformers import SwinConfig

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    network = {**config.to_dict(), "window_size": 4}
    values = {"type": "hub", "network": network, "preprocessing": {"image_size": 32}}
    encoder = read_vision_config(values, "vit").build()
    assert (encoder.n_class_tokens, encoder.n_patches) == (0, 16)
    assert encoder.patch_features(torch.randn(1, 3, 32, 32)).shape == (1, 16, encoder.width)


@torch.no_grad()
def test_hub_config_and_weights_need_no_folder(tmp_path):
    """A system's checkpoint holds both, but no buffers, such as rotary frequencies."""
    from seed_multimodal.nn.pretrained import without_memory
    from seed_multimodal.state_dicts import assign_strictly

    write_vision("dinov3", tmp_path / "dino")
    encoder = load_hub_vision(tmp_path / "dino")
    config = HubVisionConfig(path=str(tmp_path / "dino"))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "dino").rename(tmp_path / "elsewhere")
    assert read_vision_config(values, "vit") == config
    again = without_memory(read_vision_config(values, "vit").build)
    assign_strictly(again, encoder.state_dict(), "the encoder")
    assert_close(again.eval()(PIXELS), encoder(PIXELS))


@torch.no_grad()
def test_one_half_of_a_whole_siglip(tmp_path):
    # Its publisher has no folder of the vision model alone.
    from transformers import SiglipConfig, SiglipModel

    sizes = KINDS["siglip"]["sizes"]
    text = {key: value for key, value in sizes.items() if key not in ("image_size", "patch_size")}
    config = SiglipConfig(text_config={**text, "vocab_size": 30}, vision_config=dict(sizes))
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", KINDS["siglip"]["preprocessor"])
    expected = model.vision_model(pixel_values=PIXELS).last_hidden_state
    assert_close(load_hub_vision(tmp_path)(PIXELS), expected)


@pytest.mark.parametrize(
    "file, named, error",
    [
        ("config.json", "siglip", ConfigError),
        ("model.safetensors", "siglip", CheckpointError),
        ("preprocessor_config.json", "preprocessor_config.json", ConfigError),
    ],
)
def test_hub_vision_names_what_a_folder_lacks(file, named, error, tmp_path):
    write_vision("siglip", tmp_path / "siglip")
    encoder = load_hub_vision(tmp_path / "siglip")
    with pytest.raises(ImageError, match="24"):  # pixels, of 16
        encoder(torch.zeros(1, 3, 24, 24))
    (tmp_path / "siglip" / file).unlink()
    with pytest.raises(error, match=named):
        load_hub_vision(tmp_path / "siglip")


def test_hub_vision_of_no_vision_model(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "nothing"})
    with pytest.raises(ConfigError, match=tmp_path.name):
        load_hub_vision(tmp_path)
