"""Loading SEED-1: the released layout, training checkpoints, our folder, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_seed1
import torch

from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.tokenizers.checkpoints import find_files
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.seed1 import Seed1Tokenizer
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer


@pytest.fixture(autouse=True)
def _no_cached_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    torch.hub.set_dir(str(tmp_path / "torch_home" / "hub"))


@pytest.fixture(scope="module")
def original() -> Seed1Tokenizer:
    return tiny_seed1.tokenizer()


@pytest.fixture
def folder(original: Seed1Tokenizer, tmp_path: Path) -> Path:
    return tiny_seed1.released_folder(original, tmp_path / "pretrained")


def _same(loaded: Seed1Tokenizer, original: Seed1Tokenizer, images: torch.Tensor) -> None:
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.encode(images), original.encode(images))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def _edit(file: Path, **changes: torch.Tensor | None) -> None:
    state = torch.load(file, weights_only=True)
    inner = state.get("model", state)
    for name, value in changes.items():
        if value is None:
            del inner[name]
        else:
            inner[name] = value
    torch.save(state, file)


def test_released_layout(original: Seed1Tokenizer, folder: Path, images: torch.Tensor) -> None:
    lines: list[str] = []
    loaded = Seed1Tokenizer.from_pretrained(folder, config=original.config, log=lines.append)
    _same(loaded, original, images)
    report = loaded.load_report
    assert report is not None and report.missing == [] and len(report.loaded) == len(original.state_dict())
    groups = {name.split(".")[0] for name in report.ignored}
    assert groups == {"Qformer", "temp", "vision_proj", "text_proj", "pos_embed", "blocks", "visual_encoder"}
    assert {name for name in report.ignored if name.startswith("visual")} == {
        f"visual_encoder.blocks.2.{name}" for name in loaded.visual_encoder.blocks[0].state_dict()}
    assert len(lines) == 1 and "causal_qformer.pth" in lines[0] and "temp (1)" in lines[0]


@pytest.mark.parametrize("name", ["seed_tokenizer.pth", "causal_qformer.pth", "eva_vit_g.pth"])
def test_a_file_of_the_released_layout_as_safetensors(original: Seed1Tokenizer, folder: Path, images: torch.Tensor,
                                                      name: str) -> None:
    from seed_multimodal.weights import load_state_dict, save_state_dict

    save_state_dict(load_state_dict(folder / name), (folder / name).with_suffix(".safetensors"))
    (folder / name).unlink()
    _same(Seed1Tokenizer.from_pretrained(folder, config=original.config), original, images)


def test_the_second_file_wins_and_says_so(original: Seed1Tokenizer, folder: Path, images: torch.Tensor) -> None:
    _edit(folder / "causal_qformer.pth", pos_embed_text=torch.ones_like(original.pos_embed_text))
    lines: list[str] = []
    loaded = Seed1Tokenizer.from_pretrained(folder / "seed_tokenizer.pth", config=original.config, log=lines.append)
    _same(loaded, original, images)
    assert "seed_tokenizer.pth: 1 of its tensors are in causal_qformer.pth too" in lines[0]


def test_old_files_without_position_ids(original: Seed1Tokenizer, folder: Path, images: torch.Tensor) -> None:
    _edit(folder / "causal_qformer.pth", **{"Qformer.bert.embeddings.position_ids": None})
    _edit(folder / "seed_tokenizer.pth", **{"Reverse_Qformer.bert.embeddings.position_ids": None})
    loaded = Seed1Tokenizer.from_pretrained(folder, config=original.config)
    _same(loaded, original, images)
    assert loaded.load_report is not None and len(loaded.load_report.missing) == 2


@pytest.mark.parametrize(("file", "name"), [
    ("causal_qformer.pth", "query_tokens"), ("causal_qformer.pth", "ln_vision.weight"),
    ("seed_tokenizer.pth", "quantize.embedding.weight"), ("seed_tokenizer.pth", "distill_text_proj.bias"),
    ("seed_tokenizer.pth", "reverse_tokens"), ("eva_vit_g.pth", "cls_token")])
def test_a_missing_tensor_is_named(original: Seed1Tokenizer, folder: Path, file: str, name: str) -> None:
    _edit(folder / file, **{name: None})
    with pytest.raises(CheckpointError, match=f"'{name}'") as caught:
        Seed1Tokenizer.from_pretrained(folder, config=original.config)
    assert "\n" not in str(caught.value)


def test_another_size_is_refused_and_an_unknown_tensor_left_out(original: Seed1Tokenizer, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"distill_text_proj\.weight.*\(16, 24\).*\(20, 24\)"):
        Seed1Tokenizer.from_pretrained(folder, config=dataclasses.replace(original.config, text_features_dim=20))
    _edit(folder / "seed_tokenizer.pth", surprise=torch.zeros(2))
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 'surprise'"):
        loaded = Seed1Tokenizer.from_pretrained(folder, config=original.config)
    assert loaded.load_report is not None and loaded.load_report.unlisted == ["surprise"]


def test_training_names_of_the_text_branch(original: Seed1Tokenizer, folder: Path, images: torch.Tensor) -> None:
    """The published training code: `_text` names, and an image branch whose names collide with the released ones."""
    state = torch.load(folder / "seed_tokenizer.pth", weights_only=True)["model"]
    state = {tiny_seed1.training_name(name): value for name, value in state.items()}
    image = {f"Reverse_Qformer.{n}": v for n, v in QFormer(original.config.reverse_qformer, 24).state_dict().items()}
    image |= {"reverse_tokens": torch.zeros(1, 1, 24), "distill_image_proj.weight": torch.zeros(10, 24),
              "distill_image_proj.bias": torch.zeros(10), "pos_embed_image": torch.zeros(1, 32, 24)}
    image |= {f"blocks_image.{n}": v for n, v in original.blocks_text.state_dict().items()}
    torch.save({"model": state | image}, folder / "seed_tokenizer.pth")
    loaded = Seed1Tokenizer.from_pretrained(folder, config=original.config)
    _same(loaded, original, images)
    assert loaded.load_report is not None
    assert {"Reverse_Qformer", "reverse_tokens", "distill_image_proj", "blocks_image", "pos_embed_image"} <= {
        name.split(".")[0] for name in loaded.load_report.ignored}


def test_names_are_left_alone_without_a_text_branch(original: Seed1Tokenizer) -> None:
    state = original.state_dict()
    renamed, left_out = Seed1Tokenizer.released_names(state)
    assert list(renamed) == list(state) and left_out == []


def test_our_folder_round_trip(original: Seed1Tokenizer, tmp_path: Path, images: torch.Tensor) -> None:
    original.save_pretrained(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    _same(Seed1Tokenizer.from_pretrained(tmp_path / "mine"), original, images)
    _same(Seed1Tokenizer.from_pretrained(tmp_path / "mine" / "model.safetensors"), original, images)
    half = Seed1Tokenizer.from_pretrained(tmp_path / "mine", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    larger = Seed1Tokenizer.from_pretrained(tmp_path / "mine", image_size=32)
    assert larger.encode(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_a_config_beside_the_released_files_gives_the_sizes(original: Seed1Tokenizer, folder: Path,
                                                            images: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"the vit width 16 is not the released one \(1408\).*Seed1Config"):
        Seed1Tokenizer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(original.config.to_dict()))
    _same(Seed1Tokenizer.from_pretrained(folder), original, images)
    (folder / "config.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid json"):
        Seed1Tokenizer.from_pretrained(folder)


def test_another_model_is_refused(original: Seed1Tokenizer, folder: Path, tmp_path: Path) -> None:
    config = original.config
    second = Seed2Tokenizer(Seed2Config(vit=config.vit, qformer=config.qformer, codebook_size=50, codebook_dim=6,
                                        decode_depth=1, image_features_dim=10))
    torch.save(second.state_dict(), tmp_path / "seed_quantizer.pt")
    with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt: this is a SEED-2 tokenizer.*Seed2Tokenizer"):
        Seed1Tokenizer.from_pretrained(tmp_path / "seed_quantizer.pt")
    with pytest.raises(CheckpointError, match="this is the vision tower alone"):
        Seed1Tokenizer.from_pretrained(folder / "eva_vit_g.pth")
    with pytest.raises(CheckpointError, match=r"causal_qformer\.pth: not a complete SEED-1 tokenizer"):
        Seed1Tokenizer.from_pretrained(folder / "causal_qformer.pth")
    with pytest.raises(CheckpointError, match="not an EVA vision tower"):
        Seed1Tokenizer.from_pretrained(folder, vision=folder / "causal_qformer.pth", config=config)


def test_the_released_folder_is_told_when_seed_2_is_asked_for(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pretrained: this is a SEED-1 tokenizer \(causal_qformer\.pth and "
                                              r"seed_tokenizer\.pth\); load it with Seed1Tokenizer"):
        Seed2Tokenizer.from_pretrained(folder)


def test_missing_files_are_named_with_their_place(original: Seed1Tokenizer, folder: Path, tmp_path: Path,
                                                  images: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"absent: there is no such SEED-1 tokenizer; put causal_qformer\.pth"):
        Seed1Tokenizer.from_pretrained(tmp_path / "absent")
    tower = tmp_path / "tower.pth"
    (folder / "eva_vit_g.pth").rename(tower)
    with pytest.raises(CheckpointError, match=r"vision tower is stored apart.*pretrained/eva_vit_g\.pth"):
        Seed1Tokenizer.from_pretrained(folder, config=original.config)
    _same(Seed1Tokenizer.from_pretrained(folder, vision=tower, config=original.config), original, images)
    with pytest.raises(CheckpointError, match="no such vision-tower file"):
        Seed1Tokenizer.from_pretrained(folder, vision=tmp_path / "nowhere.pth", config=original.config)
    cached = Path(torch.hub.get_dir()) / "checkpoints"
    cached.mkdir(parents=True)
    tower.rename(cached / "eva_vit_g.pth")
    assert find_files(folder, Seed1Tokenizer.layout, "seed1_tokenizer").vision == cached / "eva_vit_g.pth"
    (folder / "causal_qformer.pth").unlink()
    with pytest.raises(CheckpointError, match=r"holds no SEED-1 tokenizer weights \(causal_qformer\.pth missing\)"):
        Seed1Tokenizer.from_pretrained(folder)
