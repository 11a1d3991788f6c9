"""LaVIT's tokenizer and decoder on disk: the original layout and saved folders (wrong files:
`unit/models/test_weight_faults.py`; values: golden kinds `lavit_tokenizer`, `lavit_decoder`)."""

import dataclasses
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tensors import equal, normal
from tiny import write_json
from tiny.lavit import DECODER, TOKENIZER, small_tokenizer, visual_weight
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer, load_tokenizer_pair
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_multimodal.weights.catalogue import VISUAL_WEIGHTS


def original(folder) -> Path:
    """An original folder of stage 1 (seed 0) and stage 2 (seed 1)."""
    state = small_tokenizer(0).state_dict()
    encoder = {name: state.pop(name) for name in list(state) if name.startswith("encoder.")}
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": {
            name.removeprefix("encoder."): value for name, value in encoder.items()
        },
        "visual_tokenizer/tokenizer_encoder.bin": {
            name: value for name, value in state.items() if not name.startswith("vit_proj.")
        },
        "language_model/visual_weight.bin": visual_weight(small_tokenizer(1)),
    }
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / name)
    write_json(folder / "visual_tokenizer" / "config.json", asdict(TOKENIZER))
    return folder


def two_stages() -> tuple[DynamicTokenizer, DynamicTokenizer]:
    """The tokenizers of that folder for codes and for understanding."""
    understanding = small_tokenizer(0)
    second = small_tokenizer(1)
    understanding.causal_encoder = second.causal_encoder
    understanding.vit_proj = second.vit_proj
    return small_tokenizer(0), understanding


def assert_equal(rows: list[Tensor], others: list[Tensor]):
    assert all(torch.equal(row, other) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("layout", ["bin", "safetensors", "saved"])
def test_load_both_reads_each_token_merger_from_its_file(layout, tmp_path):
    pixels = normal(1, 2, 3, 16, 16)
    # Codes of the first, features of the second: mixed up, images would be described wrongly.
    first, second = two_stages()
    language_model = None
    if layout == "saved":
        first.save_pretrained(tmp_path)
        save_state_dict(visual_weight(second), tmp_path / VISUAL_WEIGHTS)
    else:
        language_model = original(tmp_path) / "language_model"
    for file in tmp_path.rglob("*.bin") if layout == "safetensors" else ():
        save_state_dict(load_state_dict(file), file.with_suffix(".safetensors"))
        file.unlink()
    generator, understanding = load_tokenizer_pair(tmp_path, language_model)
    codes = first.encode(pixels, mode="threshold")
    for model in (load_dynamic_tokenizer(tmp_path), generator):
        assert_equal(model.encode(pixels, mode="threshold"), codes)
        assert replace(model.config, llm_width=TOKENIZER.llm_width) == TOKENIZER
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert (model.vit_proj is None) == (layout != "saved")
    features = understanding.patch_features(pixels)
    keep = understanding.select(features, mode="threshold").keep_BN
    assert_equal(understanding.project(features, keep), second.project(features, keep))
    assert generator.encoder is understanding.encoder  # in memory once
    if layout != "saved":
        assert load_tokenizer_pair(tmp_path)[1] is None


def test_load_names_a_missing_projector(tmp_path):
    # Without it images would be read as noise.
    file = original(tmp_path) / "language_model" / "visual_weight.bin"
    state = load_state_dict(file)
    del state["vit_proj.weight"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"vit_proj\.weight"):
        load_tokenizer_pair(tmp_path, file.parent)


def test_save_without_training_state_and_projector(tmp_path):
    # Moving averages are of the training; stage 2 adds the projector.
    saved = small_tokenizer()
    saved.quantize.start_averages(0.9)
    saved.vit_proj = None
    saved.save_pretrained(tmp_path)
    names = load_state_dict(tmp_path / "model.safetensors")
    assert not any("ema" in name or "vit_proj" in name for name in names)
    assert load_tokenizer_pair(tmp_path)[1] is None


def test_from_pretrained_layouts(tmp_path):
    # Our folder, and the original's: one file for each head.
    high = CodeDecoder(dataclasses.replace(DECODER, head="highres"))
    low = CodeDecoder(dataclasses.replace(DECODER, head="lowres"))
    saved = high.save_pretrained(tmp_path / "saved")
    original = tmp_path / "LaVIT" / "visual_tokenizer"
    original.mkdir(parents=True)
    torch.save(high.state_dict(), original / "highres_tokenizer_decoder.bin")
    torch.save(low.state_dict(), original / "tokenizer_decoder.bin")
    for folder, head, config, model in (
        (saved, None, None, high),
        (original.parent, None, DECODER, high),
        (original.parent, "lowres", DECODER, low),
        (original, "highres", DECODER, high),
    ):
        loaded = CodeDecoder.from_pretrained(folder, head=head, config=config)
        assert loaded.config == model.config
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert equal(model.state_dict(), state)
