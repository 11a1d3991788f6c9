"""LaVIT's tokenizer on disk: the original layout, saved folders, a shared vision encoder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.lavit import SMALL, small_tokenizer
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.lavit.checkpoints import (
    load_dynamic_tokenizer,
    load_tokenizer_pair,
    save_dynamic_tokenizer,
    visual_weight_state,
)
from seed_multimodal.models.lavit.losses import ema_codebook
from seed_multimodal.models.lavit.modeling import DynamicTokenizer

State = dict[str, Tensor]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def original(folder: Path, **changes: State) -> Path:
    """An original folder of stage 1 (seed 0) and stage 2 (seed 1).

    `changes` replace a file's tensors, a tensor without elements removes one.
    """
    first = small_tokenizer(0).state_dict()
    second = small_tokenizer(1)
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": {
            k.removeprefix("encoder."): v for k, v in first.items() if k.startswith("encoder.")
        },
        "visual_tokenizer/tokenizer_encoder.bin": {
            k: v for k, v in first.items() if not k.startswith(("encoder.", "vit_proj."))
        },
        "language_model/visual_weight.bin": visual_weight_state(second),
    }
    for name, state in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {k: v for k, v in {**state, **changes.get(file.stem, {})}.items() if v.numel()}, file
        )
    (folder / "visual_tokenizer" / "config.json").write_text(json.dumps(asdict(SMALL)))
    return folder


def two_stages() -> tuple[DynamicTokenizer, DynamicTokenizer]:
    """The tokenizers of that folder for codes and for understanding."""
    first = small_tokenizer(0)
    understanding = small_tokenizer(0)
    second = small_tokenizer(1)
    understanding.causal_encoder = second.causal_encoder
    understanding.vit_proj = second.vit_proj
    return first, understanding


def equal(rows: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(row, other) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("layout", ["bin", "safetensors", "saved"])
def test_load_both_reads_each_token_merger_from_its_file(layout, tmp_path, pixels: Tensor):
    first, second = two_stages()
    if layout == "saved":
        save_dynamic_tokenizer(first, tmp_path, second)
    else:
        original(tmp_path)
    for file in tmp_path.rglob("*.bin") if layout == "safetensors" else ():
        save_file(torch.load(file), file.with_suffix(".safetensors"))
        file.unlink()
    codes = first.encode(pixels, mode="threshold")
    rows = second.continuous(pixels, mode="threshold")
    generator, understanding = load_tokenizer_pair(
        tmp_path, None if layout == "saved" else tmp_path / "language_model"
    )
    for model in (load_dynamic_tokenizer(tmp_path), generator):
        assert equal(model.encode(pixels, mode="threshold"), codes)
        assert replace(model.config, llm_width=SMALL.llm_width) == SMALL
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert (model.vit_proj is None) == (layout != "saved")
    assert understanding is not None and equal(
        understanding.continuous(pixels, mode="threshold"), rows
    )
    assert generator.encoder is understanding.encoder
    assert generator.causal_encoder is not understanding.causal_encoder
    if layout != "saved":
        assert load_tokenizer_pair(tmp_path)[1] is None


def test_load_missing_unsafe_or_misshapen_files(tmp_path):
    original(tmp_path, tokenizer_encoder={"quantize.embedding.weight": torch.ones(21, 4)})
    with pytest.raises(
        CheckpointError, match=r"'quantize.embedding.weight': the file has \(21, 4\)"
    ):
        load_dynamic_tokenizer(tmp_path)
    torch.save({"code": Path}, tmp_path / "visual_tokenizer" / "tokenizer_encoder.bin")
    with pytest.raises(CheckpointError, match="unsafe pickle content"):
        load_dynamic_tokenizer(tmp_path)
    original(tmp_path, visual_weight={"vit_proj.weight": torch.empty(0)})
    with pytest.raises(CheckpointError, match="missing from the file: 'vit_proj.weight'"):
        load_tokenizer_pair(tmp_path, tmp_path / "language_model")
    with pytest.raises(CheckpointError, match="seed fetch lavit downloads"):
        load_dynamic_tokenizer(tmp_path / "nowhere")


def test_save_without_training_state_and_projector(tmp_path, pixels: Tensor):
    saved = small_tokenizer()
    generator, understanding = load_tokenizer_pair(save_dynamic_tokenizer(saved, tmp_path))
    assert generator is understanding
    assert equal(
        generator.continuous(pixels, mode="threshold"), saved.continuous(pixels, mode="threshold")
    )
    model = DynamicTokenizer(SMALL)
    model.quantize = ema_codebook(model.quantize, 0.9)
    model.vit_proj = None
    save_dynamic_tokenizer(model, tmp_path)
    assert not any(
        "ema" in name or "vit_proj" in name for name in load_file(tmp_path / "model.safetensors")
    )
    assert load_tokenizer_pair(tmp_path)[1] is None


def test_save_with_the_vision_encoder_of_another_system(tmp_path, pixels: Tensor):
    model = small_tokenizer(0)
    other = tmp_path / "nano" / "model.safetensors"
    other.parent.mkdir()
    save_file(
        {
            "other.weight": torch.ones(2),
            **{
                f"visual_{name}": value
                for name, value in model.state_dict().items()
                if name.startswith("encoder.")
            },
        },
        other,
    )
    saved_dir = save_dynamic_tokenizer(
        model, tmp_path / "saved", shared_encoder=(other, "visual_encoder.")
    )
    assert not [
        name for name in load_file(saved_dir / "model.safetensors") if name.startswith("encoder.")
    ]
    again = load_dynamic_tokenizer(saved_dir)
    assert equal(
        again.continuous(pixels, mode="threshold"), model.continuous(pixels, mode="threshold")
    )
    other.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_dynamic_tokenizer(saved_dir)
