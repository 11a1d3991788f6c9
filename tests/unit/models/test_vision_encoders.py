"""Tokenizers of SEED and LaVIT with vision encoders of transformers: equal pixels and codes
everywhere."""

import dataclasses
import shutil

import pytest
import torch
from random_images import noise
from tiny.seed import SIZES, loud, save_as_lavis
from tiny.vision import KINDS, write_vision

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.models.seed.configuration import Seed2Config
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.pipelines.images import open_images
from seed_multimodal.pretokenize.encode import Encoder, read_transform
from seed_multimodal.recipes.seed.export import export_tokenizer
from seed_multimodal.recipes.seed.losses import Stage1Model, Stage1TrainingOptions, Stage2Model

IMAGE = noise(1, (44, 30))  # no square, so that squashing and cropping differ


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_seed_tokenizer_of_another_vision_encoder(kind, tmp_path):
    # Its trainings: `unit/seed_tokenizer/test_vision_encoders.py`.
    vision = tmp_path / "vision"
    write_vision(kind, vision)
    vit = HubVisionConfig(path=str(vision))
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)

    # 1. Both stages, of uint8 pixels of the data workers, normalised for the encoder.
    preprocessing = vit.preprocessing
    pixels = preprocessing.normalise(preprocessing.read(IMAGE))[None]
    torch.manual_seed(0)
    first = loud(Stage1Model(config, vocab_size=40, options=Stage1TrainingOptions(embed_dim=8)))
    load_vision(first.visual_encoder, vision, None)
    second = loud(Stage2Model(config))
    second.load_stage1(first.state_dict())
    with torch.no_grad():
        # Rows of the codebook at the features of the image, so that its codes differ.
        second.quantize.embedding.weight[: config.num_query] = second.eval().pre_quant(pixels)[0]
    codes = second.encode(pixels)
    assert len(codes.unique()) > 4

    # 2. The exported folder needs the encoder's folder no more.
    stage1 = save_as_lavis(first, tmp_path / "stage1.pth")
    stage2 = save_as_lavis(second, tmp_path / "stage2.pth")
    out = tmp_path / "tokenizer"
    export_tokenizer(stage2, out, stage1=stage1, config=config)
    shutil.rmtree(vision)

    # 3. Serving and pre-tokenising see the same pixels and give the same codes.
    codec = open_images(out, device="cpu", dtype="float32")
    assert torch.equal(codec.transform(codec.open(IMAGE))[None], pixels)
    assert torch.equal(codec.encode([IMAGE]), codes)
    encoder = Encoder(str(out), "cpu", "auto", compile=False)
    assert encoder(encoder.transform.read(IMAGE)[None]) == codes.tolist()


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
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="preprocessor_config"):
        read_transform(yaml, default)


@torch.no_grad()
def test_stage2_gives_the_target_clip_its_own_pixels(tmp_path):
    # Of another mean and size than the encoder's.
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    write_vision("siglip", tmp_path)
    vit = HubVisionConfig(path=str(tmp_path))
    sizes = {**KINDS["clip"]["sizes"], "image_size": 24}
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=10)).eval()
    config = Seed2Config(**{**SIZES, "vit": vit}, image_features_dim=10)
    model = Stage2Model(config, clip_model=clip)
    grey = torch.full((1, 3, 16, 16), 120, dtype=torch.uint8)
    target = model.target_of(vit.preprocessing.normalise(grey))
    grey = torch.full((1, 3, 24, 24), 120, dtype=torch.uint8)
    expected = clip(ImageTransform(24).normalise(grey)).image_embeds
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
