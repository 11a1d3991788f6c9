"""SEED-X's vision encoder at a tiny size: batches, precision, files (activations: golden kind
`seedx_visual`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seed_multimodal.errors import CheckpointError, SeedWarning
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


@pytest.mark.parametrize("prefix", ["", IN_QWEN_VL])
def test_from_pretrained_of_the_original_file_and_its_folder(encoder: QwenVit, tmp_path, prefix):
    images = torch.randn(2, 3, 28, 28)
    lines = []
    file = tmp_path / "qwen_vit_G.pt"
    torch.save(
        {prefix + name: value.bfloat16() for name, value in encoder.state_dict().items()}, file
    )
    expected = encoder.to(torch.bfloat16)(images)
    for source in (file, str(tmp_path)):
        again = QwenVit.from_pretrained(
            source, config=SMALL, dtype=torch.bfloat16, log=lines.append
        )
        assert torch.equal(again(images), expected)
    assert not again.training and not any(value.requires_grad for value in again.parameters())
    assert (
        lines[0]
        == f"{file}: {len(encoder.state_dict())} tensors loaded, 0 not in the file, 0 in the file "
        "ignored."
    )
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8}'
    )  # another model's
    with pytest.raises(
        CheckpointError, match="tensors have another size"
    ):  # the original sizes apply
        QwenVit.from_pretrained(file)


def test_save_pretrained_with_sizes(encoder: QwenVit, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "encoder")
    images = torch.randn(2, 3, 28, 28)
    for source in (folder, folder / "model.safetensors"):
        again = QwenVit.from_pretrained(source)
        assert again.config == SMALL and torch.equal(again(images), encoder(images))


def test_from_pretrained_of_wrong_files(encoder: QwenVit, tmp_path):
    state = encoder.state_dict()
    file = tmp_path / "qwen_vit_G.pt"
    with pytest.raises(
        CheckpointError, match=r"Qwen/Qwen-VL-Chat; src/tools/reload_qwen_vit\.py takes it out of"
    ):
        QwenVit.from_pretrained(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {name: value for name, value in state.items() if name != "ln_post.bias"},
            "missing from the file: 'ln_post",
        ),
        (
            {**state, "proj": torch.zeros(2, 2)},
            r"first 'proj': the file has \(2, 2\), the model needs \(16, 16\)",
        ),
        ({"proj": torch.zeros(2), "run": print}, "unsafe pickle content"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            QwenVit.from_pretrained(file, config=SMALL)
    torch.save({**state, "head.weight": torch.zeros(2)}, file)
    with pytest.warns(SeedWarning, match="'head.weight'"):
        QwenVit.from_pretrained(file, config=SMALL)
