"""Checkpoints: tokenizers in every layout, wrong files, weights that training starts from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_seed1
import torch
from tensors import equal
from torch import Tensor

from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.models.seed.checkpoints import (
    load_blip2,
    load_vision,
)
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed2Config
from seed_multimodal.models.seed.losses import Stage1Model
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.nn.vision.clip import load_clip_text, load_clip_vision
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit
from seed_multimodal.weights import load_state_dict, save_state_dict


@pytest.fixture
def seed2(tiny: Seed2Config) -> Seed2Tokenizer:
    return tiny_seed1.loud(Seed2Tokenizer(tiny)).eval()  # type: ignore[return-value]


def _seed2_folder(model: SeedTokenizer, folder: Path) -> Path:
    """`seed_quantizer.pt` with training-only tensors, `eva_vit_g.pth` with one block more than
    used.
    """
    folder.mkdir(parents=True)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("visual_encoder.")
    }
    extra = {
        "Reverse_Qformer_text.x.weight": torch.zeros(3),
        "reverse_tokens_text": torch.zeros(3),
        "blocks_text.0.x": torch.zeros(3),
        "temp": torch.zeros(()),
        "itm_head.weight": torch.zeros(3),
    }
    torch.save(state | extra, folder / "seed_quantizer.pt")
    deeper = EvaVit(dataclasses.replace(model.config.vit, depth=3)).state_dict()
    torch.save(deeper | model.visual_encoder.state_dict(), folder / "eva_vit_g.pth")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3}))
    return folder


def _saved_file(model: SeedTokenizer, folder: Path) -> Path:
    return model.save_pretrained(folder) / "model.safetensors"


def _original(model: SeedTokenizer, folder: Path) -> Path:
    if isinstance(model, Seed1Tokenizer):
        return tiny_seed1.released_folder(model, folder)
    return _seed2_folder(model, folder)


def _original_file(model: SeedTokenizer, folder: Path) -> Path:
    return _original(model, folder) / model.layout.files[-1]


def _original_as_safetensors(model: SeedTokenizer, folder: Path) -> Path:
    for file in [*_original(model, folder).glob("*.pt"), *folder.glob("*.pth")]:
        save_state_dict(load_state_dict(file), file.with_suffix(".safetensors"))
        file.unlink()
    return folder


def _original_with_config(model: SeedTokenizer, folder: Path) -> Path:
    (_original(model, folder) / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def _vision_in_the_hub_cache(model: SeedTokenizer, folder: Path) -> Path:
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir(parents=True)
    (_original(model, folder) / "eva_vit_g.pth").rename(cache / "eva_vit_g.pth")
    return folder


LAYOUTS = [
    SeedTokenizer.save_pretrained,
    _saved_file,
    _original,
    _original_file,
    _original_as_safetensors,
    _original_with_config,
    _vision_in_the_hub_cache,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
@pytest.mark.parametrize("kind", ["seed2", "seed1"])
def test_from_pretrained_layouts(
    kind,
    layout,
    seed2: Seed2Tokenizer,
    tmp_path,
    images: Tensor,
):
    model: Any = seed2 if kind == "seed2" else tiny_seed1.tokenizer()
    lines: list[str] = []
    source = layout(model, tmp_path / "folder")
    has_config = layout in (SeedTokenizer.save_pretrained, _saved_file, _original_with_config)
    loaded = type(model).from_pretrained(
        source, config=None if has_config else model.config, log=lines.append
    )
    assert loaded.config == model.config and len(lines) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert not loaded.training and not any(
        parameter.requires_grad for parameter in loaded.parameters()
    )
    if layout is _original:
        assert "eva_vit_g.pth" in lines[0]


def test_from_pretrained_with_vision_elsewhere(seed2: Seed2Tokenizer, tmp_path, images: Tensor):
    folder = _seed2_folder(seed2, tmp_path / "a")
    (folder / "eva_vit_g.pth").rename(tmp_path / "vision.pth")
    with pytest.raises(
        CheckpointError, match=r"eva_vit_g\.pth: no such vision-encoder file; seed fetch"
    ):
        Seed2Tokenizer.from_pretrained(folder, config=seed2.config)
    loaded = Seed2Tokenizer.from_pretrained(
        folder, vision=tmp_path / "vision.pth", config=seed2.config
    )
    assert torch.equal(loaded.encode(images), seed2.encode(images))


def test_from_pretrained_with_another_image_size_and_no_reconstruction(
    seed2: Seed2Tokenizer, tmp_path
):
    folder = _seed2_folder(seed2, tmp_path / "a")
    larger = dataclasses.replace(
        seed2.config, recon_s=False, vit=dataclasses.replace(seed2.config.vit, image_size=32)
    )
    loaded = Seed2Tokenizer.from_pretrained(folder, config=larger)
    assert loaded.visual_encoder.pos_embed.shape == (1, 17, 16) and not hasattr(loaded, "blocks")
    assert loaded.encode(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_from_pretrained_with_names_of_the_training_code(tmp_path, images: Tensor):
    """There SEED-1's decoder is a text branch next to SEED-2's image branch."""
    model = tiny_seed1.tokenizer()
    folder = tiny_seed1.released_folder(model, tmp_path / "a")
    state = {
        tiny_seed1.training_name(name): value
        for name, value in load_state_dict(folder / "seed_tokenizer.pth").items()
    }
    image_branch = {
        "reverse_tokens": torch.zeros(1, 1, 24),
        "distill_image_proj.weight": torch.zeros(10, 24),
    }
    torch.save({"model": state | image_branch}, folder / "seed_tokenizer.pth")
    loaded = Seed1Tokenizer.from_pretrained(folder, config=model.config)
    torch.testing.assert_close(
        loaded.decode(loaded.encode(images)), model.decode(model.encode(images))
    )


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "seed_quantizer.pt",
            {"encode_task_layer.2.bias": None},
            "1 tensors are missing .*'encode_task_layer.2.bias'",
        ),
        (
            "eva_vit_g.pth",
            {"blocks.1.attn.q_bias": None},
            "1 tensors are missing .*blocks.1.attn.q_bias",
        ),
        (
            "seed_quantizer.pt",
            {"encode_task_layer.2.bias": torch.zeros(99)},
            r"the file has \(99,\), the model needs",
        ),
        ("seed_quantizer.pt", {"another.a": torch.zeros(2)}, "1 tensor unknown to the model"),
    ],
)
def test_from_pretrained_with_missing_misshapen_or_unknown_tensors(
    seed2: Seed2Tokenizer,
    tmp_path,
    file,
    changes,
    message,
):
    folder = _seed2_folder(seed2, tmp_path / "a")
    state = {**load_state_dict(folder / file), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, folder / file)
    with (
        pytest.warns(SeedWarning, match=message)
        if "another.a" in changes
        else pytest.raises(CheckpointError, match=message)
    ):
        Seed2Tokenizer.from_pretrained(folder, config=seed2.config)


def test_from_pretrained_of_damaged_or_unsafe_files(seed2: Seed2Tokenizer, tmp_path):
    folder = _seed2_folder(seed2, tmp_path / "a")
    file = folder / "seed_quantizer.pt"
    state = load_state_dict(file)
    original = file.read_bytes()
    torch.save(state | {"temp": Path("a")}, tmp_path / "unsafe.pt")
    unsafe = (tmp_path / "unsafe.pt").read_bytes()
    for content, message in ((original[: len(original) // 2], ""), (unsafe, ": rejected.*unsafe")):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"seed_quantizer\.pt{message}"):
            Seed2Tokenizer.from_pretrained(folder, config=seed2.config)


def test_from_pretrained_without_files(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no such SEED-2 tokenizer; put seed_quantizer\.pt .*eva_vit_g\.pth"
    ):
        Seed2Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(
        CheckpointError, match=r"holds no SEED-1 tokenizer \(causal_qformer\.pth and seed_tokenizer"
    ):
        Seed1Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="no-such-owner/tokenizer: neither a local folder nor reachable"
    ):
        Seed2Tokenizer.from_pretrained("no-such-owner/tokenizer")


# ---- BLIP-2

EVA = EvaConfig(image_size=16, patch_size=8, width=16, depth=39, heads=2, mlp_width=24)
CONFIG = Seed2Config(
    vit=dataclasses.replace(EVA, depth=1),
    qformer=QFormerConfig(width=24, depth=2, heads=2, mlp_width=40, max_positions=20),
)


@pytest.fixture
def blip2() -> dict[str, Tensor]:
    """The contents of `blip2_pretrained.pth`: stage 1 without the vision encoder, and the matching
    head.
    """
    state = Stage1Model(CONFIG, vocab_size=61, embed_dim=8).state_dict()
    return {
        name: value for name, value in state.items() if not name.startswith("visual_encoder.")
    } | {"itm_head.weight": torch.zeros(2, 24), "itm_head.bias": torch.zeros(2)}


def _saved(state: dict[str, Tensor], file: Path) -> Path:
    torch.save({"model": state}, file)
    return file


def test_load_blip2_leaves_the_vision_encoder(blip2: dict[str, Tensor], tmp_path):
    model = Stage1Model(CONFIG, vocab_size=61, embed_dim=8)
    lines = []
    vision = {name: value.clone() for name, value in model.visual_encoder.state_dict().items()}
    report = load_blip2(model, _saved(blip2, tmp_path / "blip2_pretrained.pth"), lines.append)
    assert set(report.loaded) == set(blip2) - {"itm_head.weight", "itm_head.bias"}
    assert all(torch.equal(model.state_dict()[name], blip2[name]) for name in report.loaded)
    assert equal(vision, model.visual_encoder.state_dict())
    assert len(lines) == 1 and "2 in the file ignored" in lines[0]


def test_load_blip2_of_wrong_files(blip2: dict[str, Tensor], tmp_path):
    for state, size, message in (
        (blip2, 60, r"word_embeddings.weight': the file has \(61, 24\), the model needs"),
        ({"other": torch.zeros(2)}, 61, r"a\.pth: not a BLIP-2 stage-1 checkpoint.*'other'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_blip2(
                Stage1Model(CONFIG, vocab_size=size, embed_dim=8),
                _saved(state, tmp_path / "a.pth"),
                None,
            )
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such file; download https"):
        load_blip2(Stage1Model(CONFIG, vocab_size=61, embed_dim=8), tmp_path / "absent.pth", None)


# ---- the vision encoder and CLIP


def test_load_vision_uses_39_of_40_blocks_and_resizes_positions(tmp_path):
    source = EvaVit(dataclasses.replace(EVA, depth=40))
    torch.save(
        source.state_dict() | {"norm.weight": torch.ones(16), "head.bias": torch.ones(3)},
        tmp_path / "eva_vit_g.pth",
    )
    vit = EvaVit(dataclasses.replace(EVA, image_size=24))
    lines = []
    report = load_vision(vit, tmp_path, lines.append)
    assert len(report.loaded) == 511 and not report.missing and len(lines) == 1
    assert vit.pos_embed.shape == (1, 10, 16) and torch.equal(
        vit.pos_embed[:, 0], source.pos_embed[:, 0]
    )
    assert all(
        torch.equal(value, source.state_dict()[name])
        for name, value in vit.state_dict().items()
        if name != "pos_embed"
    )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A whole CLIP, as in laion's folder.

    The projection width of its vision_config is not that of the model.
    """
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=10,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).eval().save_pretrained(folder)
    return folder


def test_load_clip_halves_of_a_whole_clip(clip_folder: Path, images: Tensor, tmp_path):
    from transformers import CLIPModel

    full_clip = CLIPModel.from_pretrained(clip_folder).eval()
    vision = load_clip_vision(clip_folder, log=None)
    assert not vision.training and not any(p.requires_grad for p in vision.parameters())
    ids = torch.tensor([[1, 5, 2]])
    with torch.no_grad():
        expected = full_clip.visual_projection(
            full_clip.vision_model(pixel_values=images).pooler_output
        )
        torch.testing.assert_close(vision(images).image_embeds, expected)
        text = full_clip.text_projection(full_clip.text_model(ids).pooler_output)
        torch.testing.assert_close(load_clip_text(clip_folder, log=None)(ids).text_embeds, text)
    vision.save_pretrained(tmp_path, max_shard_size="6KB")  # the vision half alone, in shards
    assert torch.equal(
        load_clip_vision(tmp_path, log=None)(images).image_embeds, vision(images).image_embeds
    )
    assert load_vision(
        EvaVit(dataclasses.replace(EVA, depth=1, pre_norm=True)), clip_folder, None
    ).loaded


def test_load_clip_vision_of_wrong_folders(clip_folder: Path, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"absent: no such folder; download laion/CLIP-ViT-H-14"
    ):
        load_clip_vision(tmp_path / "absent", log=None)
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="not a complete CLIP"):
        load_clip_vision(tmp_path, log=None)
    state = load_state_dict(clip_folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_state_dict(state, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing \(download .*\): 'visual_projection.weight'"
    ):
        load_clip_vision(tmp_path, log=None)
