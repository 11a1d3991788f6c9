"""SEED-X's vision encoder at a tiny size: batches, precision, files (activations: golden kind
`seedx_visual`).
"""

from __future__ import annotations

import pytest
import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.nn.vision.qwen import IN_QWEN_VL, QwenVit, QwenVitConfig

SMALL = QwenVitConfig(
    image_size=28,
    patch_size=7,
    width=24,
    layers=2,
    heads=3,
    mlp_ratio=2.0,
    output_dim=16,
    n_queries=4,
    position_grid=3,
)
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def encoder() -> QwenVit:
    """Weights large enough that every part changes the output."""
    model = QwenVit(SMALL)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_forward_does_not_depend_on_batches(encoder: QwenVit, dtype, tolerance):
    # In each precision within its rounding.
    images = torch.randn(3, 3, 28, 28)
    exact = encoder(images)
    together = encoder.to(dtype)(images)  # the pixels stay fp32
    assert together.dtype == dtype and together.shape == (3, 4, 16)
    torch.testing.assert_close(
        torch.cat([encoder(image[None]) for image in images]), together, rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        together.float(), exact, rtol=0, atol=tolerance * float(exact.abs().max())
    )


# ---- files


@pytest.mark.parametrize("layout", ["file", "folder", "in Qwen-VL", "saved folder", "saved file"])
def test_from_pretrained_layouts(encoder: QwenVit, tmp_path, layout):
    # Our folder needs no sizes in code.
    config = None if layout.startswith("saved") else SMALL
    file = tmp_path / "qwen_vit_G.pt"
    if config is None:
        file = encoder.save_pretrained(tmp_path) / "model.safetensors"
    else:
        prefix = IN_QWEN_VL if layout == "in Qwen-VL" else ""
        torch.save({prefix + name: value for name, value in encoder.state_dict().items()}, file)
    source = tmp_path if "folder" in layout else file
    loaded = QwenVit.from_pretrained(source, config=config, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(loaded(images), encoder.to(torch.bfloat16)(images))
    assert loaded.config == SMALL
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())


def test_from_pretrained_without_sizes_has_the_original_ones(encoder: QwenVit, tmp_path):
    # The folder's config.json is another model's.
    torch.save(encoder.state_dict(), tmp_path / "qwen_vit_G.pt")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(CheckpointError, match="another size"):
        QwenVit.from_pretrained(tmp_path)
