"""Tokenizers in every layout, and weights that training starts from (wrong files:
`unit/models/test_weight_faults.py`)."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tensors import equal
from tiny import write_json
from tiny.seed import loud, seed1_tokenizer, training_name, write_released_seed1

from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.models.seed.checkpoints import load_blip2, load_vision
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer, SeedTokenizer
from seed_multimodal.nn.vision.eva import EvaVit
from seed_multimodal.recipes.seed.losses import Stage1Model, Stage1TrainingOptions
from seed_multimodal.state_dicts import load_state_dict, save_state_dict


@pytest.fixture
def seed2(tiny):
    return loud(Seed2Tokenizer(tiny)).eval()


def write_original(model: SeedTokenizer, folder) -> Path:
    """The original files, with training-only tensors and a vision encoder of one block more."""
    if isinstance(model, Seed1Tokenizer):
        return write_released_seed1(model, folder)
    folder.mkdir(parents=True)
    state = model.state_dict()
    state = {name: state[name] for name in state if not name.startswith("visual_encoder.")}
    for name in ("Reverse_Qformer_text.x.weight", "reverse_tokens_text", "blocks_text.0.x", "temp"):
        state[name] = torch.zeros(3)
    torch.save(state, folder / "seed_quantizer.pt")
    deeper = EvaVit(dataclasses.replace(model.config.vit, depth=3)).state_dict()
    torch.save(deeper | model.visual_encoder.state_dict(), folder / "eva_vit_g.pth")
    # The folder's config.json is that of a language model.
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 3})
    return folder


def write_layout(layout: str, model: SeedTokenizer, folder) -> Path:
    """What the tokenizer is loaded from."""
    if layout == "saved":
        return model.save_pretrained(folder)
    write_original(model, folder)
    file = folder / model.layout.files[-1]
    if layout == "original file":
        return file
    if layout == "safetensors":
        for file in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
            save_state_dict(load_state_dict(file), file.with_suffix(".safetensors"))
            file.unlink()
    elif layout == "vision in torch's cache":
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        cache.mkdir(parents=True)
        (folder / "eva_vit_g.pth").rename(cache / "eva_vit_g.pth")
    elif layout == "training names":
        # SEED-1's decoder as a text branch next to SEED-2's image branch.
        state = {training_name(name): value for name, value in load_state_dict(file).items()}
        width = model.config.qformer.width
        state["reverse_tokens"] = torch.zeros(1, 1, width)
        state["distill_image_proj.weight"] = torch.zeros(10, width)
        torch.save({"model": state}, file)
    return folder


LAYOUTS = ("saved", "original", "safetensors")
LAYOUTS_SEED2 = ("original file", "vision in torch's cache")


@pytest.mark.parametrize(
    "kind, layout",
    [
        *(("seed2", layout) for layout in (*LAYOUTS, *LAYOUTS_SEED2)),
        *(("seed1", layout) for layout in (*LAYOUTS, "training names")),
    ],
)
def test_from_pretrained_layouts(kind, layout, seed2, tmp_path, images):
    # Every way in which tokenizers were published or are saved gives the same codes.
    model = seed2 if kind == "seed2" else seed1_tokenizer()
    lines = []
    source = write_layout(layout, model, tmp_path / "folder")
    config = None if layout == "saved" else model.config
    loaded = type(model).from_pretrained(source, config=config, log=lines.append)
    assert loaded.config == model.config
    assert equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len(lines) == 1


def test_from_pretrained_with_unknown_tensors_and_other_files(seed2, tmp_path, images):
    # Unknown tensors are named, so that a newer file is not half read without a word.
    folder = write_original(seed2, tmp_path / "a")
    file = folder / "seed_quantizer.pt"
    torch.save(load_state_dict(file) | {"another.a": torch.zeros(2)}, file)
    vision = (folder / "eva_vit_g.pth").rename(tmp_path / "vision.pth")
    with pytest.warns(SeedWarning, match=r"another\.a"):
        loaded = Seed2Tokenizer.from_pretrained(folder, vision=vision, config=seed2.config)
    assert torch.equal(loaded.encode(images), seed2.encode(images))

    # A newcomer learns which files are needed.
    with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt .*eva_vit_g\.pth"):
        Seed2Tokenizer.from_pretrained(tmp_path / "absent")


# ---- BLIP-2


def test_load_blip2_leaves_the_vision_encoder(tiny, tmp_path):
    # As in blip2_pretrained.pth: no vision encoder, and a head that stage 1 does not have.
    options = Stage1TrainingOptions(embed_dim=8)
    source, model = (Stage1Model(tiny, vocab_size=61, options=options) for _ in range(2))
    blip2 = source.state_dict()
    blip2 = {key: value for key, value in blip2.items() if not key.startswith("visual_encoder.")}
    file = tmp_path / "blip2_pretrained.pth"
    torch.save({"model": blip2 | {"itm_head.weight": torch.zeros(2, 24)}}, file)
    vision = {key: value.clone() for key, value in model.visual_encoder.state_dict().items()}
    load_blip2(model, file, None)
    assert equal(blip2, model.state_dict())
    assert equal(vision, model.visual_encoder.state_dict())


# ---- the vision encoder


def test_load_vision_uses_39_of_40_blocks_and_resizes_positions(tiny, tmp_path):
    # BLIP-2 leaves out the last block; other image sizes interpolate.
    source = EvaVit(dataclasses.replace(tiny.vit, depth=40)).state_dict()
    torch.save(source | {"norm.weight": torch.ones(16)}, tmp_path / "eva_vit_g.pth")
    vit = EvaVit(dataclasses.replace(tiny.vit, depth=39, image_size=24))
    report = load_vision(vit, tmp_path, None)
    assert len(report.loaded) == 511
    assert not report.missing
    positions = vit.state_dict().pop("pos_embed")
    assert positions.shape == (1, 10, 16)
    assert torch.equal(positions[:, 0], source["pos_embed"][:, 0])
    for name, value in vit.state_dict().items():
        assert name == "pos_embed" or torch.equal(value, source[name]), name
