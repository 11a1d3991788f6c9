"""Qwen's tower: released sizes, sizes of images, batches, precision, checkpointing, loading and saving, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_multimodal.errors import CheckpointError, ConfigError, ImageError, SeedWarning
from seed_multimodal.nn.layers import is_checkpointed
from seed_multimodal.vision.positions import resize_square
from seed_multimodal.vision.qwen_vit import IN_QWEN_VL, QwenVit, QwenVitConfig

SMALL = QwenVitConfig(image_size=28, patch_size=7, width=24, layers=2, heads=3, mlp_ratio=2.0, output_dim=16,
                      n_queries=4, position_grid=3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tower() -> QwenVit:
    """Weights large enough that every part of the tower shows."""
    made = QwenVit(SMALL)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return made.requires_grad_(False).eval()


@pytest.mark.slow  # the first model on the meta device imports much of torch
def test_the_released_sizes() -> None:
    with torch.device("meta"):
        tower = QwenVit(QwenVitConfig())
    state = tower.state_dict()
    assert len(state) == 594 and sum(value.numel() for value in state.values()) == 1_935_610_624
    assert tower.attn_pool.config.num_heads == 32 and tower.config.mlp_width == 8192


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)])
def test_an_image_gives_the_same_alone_and_in_a_batch(tower: QwenVit, dtype: torch.dtype, tolerance: float) -> None:
    images = torch.randn(3, 3, 28, 28)
    exact = tower(images)
    tower.to(dtype)
    together = tower(images)  # pixels come in fp32 whatever the tower's precision
    assert together.dtype == dtype and together.shape == (3, 4, 16)
    torch.testing.assert_close(torch.cat([tower(one[None]) for one in images]), together, rtol=0, atol=tolerance)
    torch.testing.assert_close(together.float(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
    assert tower(images[:0]).shape == (0, 4, 16)


def test_other_squares_of_whole_patches_are_read(tower: QwenVit) -> None:
    images = torch.randn(1, 3, 56, 56)
    for size in (7, 21, 28, 56):
        grid = size // 7
        fixed = QwenVit(dataclasses.replace(SMALL, position_grid=grid)).eval()  # the table has the image's size already
        fixed.load_state_dict({**tower.state_dict(), "positional_embedding": resize_square(
            tower.positional_embedding, grid)})
        torch.testing.assert_close(tower(images[..., :size, :size]), fixed(images[..., :size, :size]))


@pytest.mark.parametrize("shape", [(1, 3, 28, 21), (1, 3, 30, 30), (1, 1, 28, 28), (3, 28, 28), (1, 3, 0, 0)])
def test_other_shapes_are_refused_in_a_sentence(tower: QwenVit, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"^Images must be \[B, 3, 28, 28\] or other squares of a multiple of 7 "):
        tower(torch.zeros(shape))


def test_patch_positions_need_a_tower_with_them(tower: QwenVit) -> None:
    images, places = torch.randn(2, 3, 28, 28), torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    told = QwenVit(dataclasses.replace(SMALL, patch_pos=True)).eval()
    assert (told(images, places) - told(images, 1 - places)).abs()[0].max() > 1e-4
    for vit, positions in ((tower, places), (told, None)):
        with pytest.raises(ConfigError, match="Patch positions belong to vision towers with patch_pos"):
            vit(images, positions)


def test_blocks_are_checkpointed_by_option_only(tower: QwenVit) -> None:
    plain, saving = QwenVit(SMALL), QwenVit(dataclasses.replace(SMALL, grad_checkpoint=True))
    saving.load_state_dict(plain.state_dict())
    assert [is_checkpointed(block) for vit in (plain, saving) for block in vit.transformer.resblocks] == [
        False, False, True, True]
    images, runs = torch.randn(2, 3, 28, 28), []
    for vit in (plain.train(), saving.train()):
        vit.transformer.resblocks[0].ln_1.register_forward_hook(lambda module, *_: runs.append(module))
        vit(images).square().mean().backward()
    assert len(runs) == 3  # forward each, and once more going backward
    for (name, got), want in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None) == (name == "attn_pool.pos_embed"), name
        if got.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, msg=name)


def test_weights_in_fp32_are_trained_under_autocast() -> None:
    tower, images = QwenVit(SMALL).train(), torch.randn(2, 3, 28, 28)
    exact = tower(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        made = tower(images)
    torch.testing.assert_close(made.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    made.float().square().mean().backward()
    grads = {name: value.grad for name, value in tower.named_parameters() if value.requires_grad}
    assert all(grad is not None and grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in grads.values())


def released_file(tower: QwenVit, folder: Path, prefix: str = "") -> Path:
    file = folder / "qwen_vit_G.pt"
    torch.save({prefix + name: value.bfloat16() for name, value in tower.state_dict().items()}, file)
    return file


@pytest.mark.parametrize("prefix", ["", IN_QWEN_VL])
def test_the_released_file_is_read_by_itself_and_by_its_folder(tower: QwenVit, tmp_path: Path, prefix: str) -> None:
    images, said = torch.randn(2, 3, 28, 28), []
    file = released_file(tower, tmp_path, prefix)
    expected = tower.to(torch.bfloat16)(images)
    for source in (file, str(tmp_path)):
        again = QwenVit.from_pretrained(source, config=SMALL, dtype=torch.bfloat16, log=said.append)
        assert torch.equal(again(images), expected)
    assert not again.training and not any(value.requires_grad for value in again.parameters())
    assert said[0] == f"{file}: {len(tower.state_dict())} tensors loaded, 0 not in the file, 0 in the file ignored."
    whole = QwenVit.from_pretrained(file, config=SMALL)
    assert whole.proj.dtype == torch.float32 and torch.equal(whole.proj, tower.proj.float())


def test_our_folder_keeps_the_sizes(tower: QwenVit, tmp_path: Path) -> None:
    folder, images = tower.save_pretrained(tmp_path / "tower"), torch.randn(2, 3, 28, 28)
    for source in (folder, folder / "model.safetensors"):
        again = QwenVit.from_pretrained(source)
        assert again.config == SMALL and torch.equal(again(images), tower(images))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "layer": 2}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown key 'layer' \(did you mean 'layers'\?\)"):
        QwenVit.from_pretrained(folder)


def test_another_model_s_configuration_beside_the_weights_is_not_read(tower: QwenVit, tmp_path: Path) -> None:
    """The released ones then hold, and their sizes do not fit these weights."""
    file = released_file(tower, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(CheckpointError, match=r"tensors have another size, first .*: the file has .*, the model needs"):
        QwenVit.from_pretrained(file)


def test_weights_that_do_not_fit_are_refused_in_a_sentence(tower: QwenVit, tmp_path: Path) -> None:
    state = tower.state_dict()
    cases: list[tuple[dict[str, Any], str]] = [
        ({name: value for name, value in state.items() if name != "ln_post.bias"}, "missing from the file: 'ln_post"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "a checkpoint of another model"),
        ({**state, "proj": torch.zeros(2, 2)}, r"first 'proj': the file has \(2, 2\), the model needs \(16, 16\)")]
    for content, words in cases:
        torch.save(content, tmp_path / "one.pt")
        with pytest.raises(CheckpointError, match=words) as caught:
            QwenVit.from_pretrained(tmp_path / "one.pt", config=SMALL)
        assert "\n" not in str(caught.value)
    torch.save({**state, "head.weight": torch.zeros(2)}, tmp_path / "one.pt")
    with pytest.warns(SeedWarning, match="'head.weight'"):
        assert QwenVit.from_pretrained(tmp_path / "one.pt", config=SMALL).load_report.ignored == ["head.weight"]


def test_missing_and_unsafe_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError, match=r"Qwen/Qwen-VL-Chat; src/tools/reload_qwen_vit\.py takes it out of"):
            QwenVit.from_pretrained(place)
    torch.save({"proj": torch.zeros(2), "run": print}, tmp_path / "qwen_vit_G.pt")
    with pytest.raises(CheckpointError, match="unsafe pickle content"):
        QwenVit.from_pretrained(tmp_path)


@pytest.mark.parametrize(("values", "words"), [
    ({"image_size": 450}, "not a multiple of the patch 14"), ({"heads": 15}, "does not divide into 15 heads"),
    ({"n_queries": 10}, "10 queries are not a square grid"), ({"pool_heads": 7}, "does not divide into 7 heads"),
    ({"mlp_ratio": 0.0}, "mlp_ratio must be above 0"), ({"layers": 0}, "layers must be at least 1")])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QwenVitConfig(**values)
