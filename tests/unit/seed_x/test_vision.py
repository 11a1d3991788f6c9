"""SEED-X's vision encoder and resampler at a tiny size: batches, precision, sizes of images, gradients, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.nn.layers import resize_square
from seed_multimodal.seed_x.vision import IN_QWEN_VL, QwenVit, QwenVitConfig, Resampler, ResamplerConfig

SMALL = QwenVitConfig(image_size=28, patch_size=7, width=24, layers=2, heads=3, mlp_ratio=2.0, output_dim=16,
                      n_queries=4, position_grid=3)
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def encoder() -> QwenVit:
    """Weights large enough that every part shows."""
    model = QwenVit(SMALL)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_encoder_gives_an_image_alone_and_in_a_batch_the_same(
    encoder: QwenVit, dtype: torch.dtype, tolerance: float
) -> None:
    images = torch.randn(3, 3, 28, 28)
    exact = encoder(images)
    together = encoder.to(dtype)(images)  # pixels are fp32 whatever the weights' precision
    assert together.dtype == dtype and together.shape == (3, 4, 16)
    torch.testing.assert_close(torch.cat([encoder(one[None]) for one in images]), together, rtol=0, atol=tolerance)
    torch.testing.assert_close(together.float(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def test_encoder_reads_other_squares_of_whole_patches(encoder: QwenVit) -> None:
    images = torch.randn(1, 3, 56, 56)
    for size in (7, 21, 28, 56):
        fixed = QwenVit(dataclasses.replace(SMALL, position_grid=size // 7)).eval()  # the table has the image's size
        fixed.load_state_dict({**encoder.state_dict(), "positional_embedding": resize_square(
            encoder.positional_embedding, size // 7)})
        torch.testing.assert_close(encoder(images[..., :size, :size]), fixed(images[..., :size, :size]))


def test_fp32_weights_are_trained_under_autocast() -> None:
    model, images = QwenVit(SMALL).train(), torch.randn(2, 3, 28, 28)
    exact = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        features = model(images)
    torch.testing.assert_close(features.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    features.float().square().mean().backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.abs().max() > 0
               for value in model.parameters() if value.requires_grad)


def test_resampler_projects_only_features_of_another_width() -> None:
    for width, projected in ((24, False), (10, True)):
        resampler = Resampler(ResamplerConfig(grid_size=2, embed_dim=24, num_heads=3, kv_dim=width))
        assert resampler(torch.randn(5, 9, width)).shape == (5, 4, 24)
        assert ("kv_proj.weight" in resampler.state_dict()) == projected


# ---- files


@pytest.mark.parametrize("prefix", ["", IN_QWEN_VL])
def test_from_pretrained_reads_the_original_file_and_its_folder(encoder: QwenVit, tmp_path: Path, prefix: str) -> None:
    images, lines, file = torch.randn(2, 3, 28, 28), [], tmp_path / "qwen_vit_G.pt"
    torch.save({prefix + name: value.bfloat16() for name, value in encoder.state_dict().items()}, file)
    expected = encoder.to(torch.bfloat16)(images)
    for source in (file, str(tmp_path)):
        again = QwenVit.from_pretrained(source, config=SMALL, dtype=torch.bfloat16, log=lines.append)
        assert torch.equal(again(images), expected)
    assert not again.training and not any(value.requires_grad for value in again.parameters())
    assert lines[0] == f"{file}: {len(encoder.state_dict())} tensors loaded, 0 not in the file, 0 in the file ignored."
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')  # another model's
    with pytest.raises(CheckpointError, match="tensors have another size"):  # the original sizes apply
        QwenVit.from_pretrained(file)


def test_save_pretrained_keeps_the_sizes(encoder: QwenVit, tmp_path: Path) -> None:
    folder, images = encoder.save_pretrained(tmp_path / "encoder"), torch.randn(2, 3, 28, 28)
    for source in (folder, folder / "model.safetensors"):
        again = QwenVit.from_pretrained(source)
        assert again.config == SMALL and torch.equal(again(images), encoder(images))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "layer": 2}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown key 'layer' \(did you mean 'layers'\?\)"):
        QwenVit.from_pretrained(folder)


def test_from_pretrained_refuses_wrong_files(encoder: QwenVit, tmp_path: Path) -> None:
    state, file = encoder.state_dict(), tmp_path / "qwen_vit_G.pt"
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen-VL-Chat; src/tools/reload_qwen_vit\.py takes it out of"):
        QwenVit.from_pretrained(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({name: value for name, value in state.items() if name != "ln_post.bias"}, "missing from the file: 'ln_post"),
        ({**state, "proj": torch.zeros(2, 2)}, r"first 'proj': the file has \(2, 2\), the model needs \(16, 16\)"),
        ({"proj": torch.zeros(2), "run": print}, "unsafe pickle content")]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            QwenVit.from_pretrained(file, config=SMALL)
    torch.save({**state, "head.weight": torch.zeros(2)}, file)
    with pytest.warns(SeedWarning, match="'head.weight'"):
        QwenVit.from_pretrained(file, config=SMALL)
