"""SEED-X's de-tokenizer: features under autocast (contract: test_pixel_decoders.py)."""

import torch
from tiny.training import write_detokenizer_parts

from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.nn.frozen import FrozenFeatures
from seed_multimodal.nn.vision.qwen import QwenVit
from seed_multimodal.recipes.seed_x.train_detokenizer import (
    pooled_features,
)
from seed_multimodal.training.pixel_decoder.encoders import (
    ImageEncoders,
    latent_moments,
)

CPU = torch.device("cpu")


def test_image_features_under_autocast(tmp_path):
    # The VAE stays in float32, and a condition's latents are its means, not scaled.
    parts = write_detokenizer_parts(tmp_path)
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
