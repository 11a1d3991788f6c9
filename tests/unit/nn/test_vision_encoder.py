"""Vision encoders: their stated sizes are those of their features."""

import pytest
import torch

from seed_multimodal.nn.vision.base import VisionEncoder
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit
from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig

EVA = EvaConfig(image_size=28, patch_size=14, width=32, depth=1, heads=2, mlp_width=64)
QWEN = QwenVitConfig(
    image_size=28, width=32, layers=1, heads=2, output_dim=64, n_queries=4, position_grid=2
)


@pytest.mark.parametrize("encoder", [EvaVit(EVA), QwenVit(QWEN)], ids=["eva", "qwen"])
def test_vision_encoder_sizes_match_its_features(encoder):
    pixels = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    assert encoder(pixels).shape == (2, encoder.n_tokens, encoder.width)
    assert encoder.n_class_tokens == int(hasattr(encoder, "cls_token"))


def test_vision_encoder_without_sizes_is_not_built():
    class Unsized(VisionEncoder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    with pytest.raises(TypeError, match="abstract"):
        Unsized()
