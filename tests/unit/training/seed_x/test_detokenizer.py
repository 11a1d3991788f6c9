"""SEED-X's de-tokenizer: features under autocast, stage 2 from stage 1 (contract:
test_pixel_decoders.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.diffusion import FEATURES
from tiny.training import detokenizer_config, write_detokenizer_parts

from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.models.seed_x.train_detokenizer import (
    DetokenizerTask,
    pooled_features,
)
from seed_multimodal.nn.vision.qwen import QwenVit
from seed_multimodal.training.frozen_models import FrozenFeatures
from seed_multimodal.training.pixel_decoder.task import (
    ImageEncoders,
    latent_moments,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_detokenizer_parts(tmp_path_factory.mktemp("detokenizer"))


@pytest.mark.slow
def test_stage_2_starts_from_the_adapter_of_stage_1(parts: Path, tmp_path):
    # With eight input channels it predicts the same; the resampler's sizes are the adapter's.
    DetokenizerTask.train(detokenizer_config(parts, tmp_path / "one", trainer={"max_steps": 1}))
    start = {"start": str(tmp_path / "one" / "adapter"), "trained": "all"}
    record = DetokenizerTask.train(
        detokenizer_config(
            parts,
            tmp_path / "two",
            2,
            model=start,
            trainer={"max_steps": 1},
            optim={"learning_rate": 0.0},
        )
    )
    first, second = (
        SdxlDetokenizer.from_pretrained(parts / "sdxl", folder)
        for folder in (tmp_path / "one" / "adapter", record["adapter"])
    )
    embeds = torch.randn(1, 4, FEATURES)
    source = Image.effect_noise((16, 16), 90)
    options = {"seeds": [1], "num_inference_steps": 2, "guidance_scale": 1.0}
    drawn = second(embeds, condition_images=[source], **options)
    assert np.array_equal(np.asarray(first(embeds, **options)), np.asarray(drawn))


def test_image_features_under_autocast(parts: Path):
    # The VAE stays in float32, and a condition's latents are its means, not scaled.
    vae = SdxlDetokenizer.load_part(parts / "sdxl", "vae")
    encoder = QwenVit.from_pretrained(parts / "vision")
    frozen = FrozenFeatures(
        encoder, CPU, lambda pixels: pooled_features(encoder, normalise(pixels), 4)
    )
    batch = {
        name: torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        for name in ("encoder_image", "image", "condition")
    }
    with torch.autocast("cpu", torch.bfloat16):
        encoded = ImageEncoders(frozen, latent_moments(vae, CPU))(
            {**batch, "conditioned": torch.tensor([True, False, True])}
        )
    with torch.no_grad():
        image = vae.encode(batch["image"].float() / 127.5 - 1).latent_dist
        condition = vae.encode(batch["condition"].float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(encoded.moments, image.parameters)
    torch.testing.assert_close(encoded.condition_latents[[0, 2]], condition[[0, 2]])
    assert not encoded.condition_latents[1].any()
