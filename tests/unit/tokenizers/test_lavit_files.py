"""LaVIT's tokenizer on disk: the released layout at a tiny size, and our own folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lavit_tokenizer import TINY, tiny_tokenizer
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_files import (
    infer_config,
    load_both,
    load_dynamic_tokenizer,
    reading_state,
    save_dynamic_tokenizer,
)

State = dict[str, Tensor]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def released(folder: Path, **changes: State) -> Path:
    """A released folder of stage 1 (seed 0) and stage 2 (seed 1); `changes` are laid over a file's tensors, a tensor
    without elements takes its place out."""
    first, second = tiny_tokenizer(0).state_dict(), tiny_tokenizer(1)
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": {k.removeprefix("encoder."): v for k, v in first.items()
                                                if k.startswith("encoder.")},
        "visual_tokenizer/tokenizer_encoder.bin": {k: v for k, v in first.items()
                                                   if not k.startswith(("encoder.", "vit_proj."))},
        "language_model/visual_weight.bin": reading_state(second),
    }
    for name, state in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = {**state, **changes.get(file.stem, {})}
        torch.save({k: v for k, v in whole.items() if v.numel()}, file)
    (folder / "visual_tokenizer" / "config.json").write_text(json.dumps(TINY.to_dict()))
    return folder


def without(*names: str) -> State:
    return {name: torch.empty(0) for name in names}


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_released_folder_for_codes(tmp_path: Path, pixels: Tensor) -> None:
    model = load_dynamic_tokenizer(released(tmp_path))
    assert equal(model.encode(pixels, mode="threshold"), tiny_tokenizer(0).encode(pixels, mode="threshold"))
    assert model.vit_proj is None and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    by_file = {Path(r.source).name: {n.split(".")[0] for n in r.loaded} for r in model.load_reports}
    assert by_file == {"eva_vitg_psz14.bin": {"encoder"},
                       "tokenizer_encoder.bin": {"token_predictor", "causal_encoder", "quantize", "encode_task_layer"}}


def test_released_folder_for_understanding_takes_the_second_merger(tmp_path: Path, pixels: Tensor) -> None:
    model, want = load_dynamic_tokenizer(released(tmp_path), understanding=True), tiny_tokenizer(0)
    second = tiny_tokenizer(1)
    want.causal_encoder, want.vit_proj = second.causal_encoder, second.vit_proj
    assert equal(model.continuous(pixels, mode="threshold"), want.continuous(pixels, mode="threshold"))
    names = [{name.split(".")[0] for name in report.loaded} for report in model.load_reports]
    assert names == [{"encoder"}, {"token_predictor", "quantize", "encode_task_layer"}, {"causal_encoder", "vit_proj"}]


def test_both_share_all_but_merger_and_projector(tmp_path: Path, pixels: Tensor) -> None:
    coding, reading = load_both(released(tmp_path))
    assert reading.encoder is coding.encoder and reading.causal_encoder is not coding.causal_encoder
    assert equal(coding.encode(pixels, mode="threshold"),
                 load_dynamic_tokenizer(tmp_path).encode(pixels, mode="threshold"))
    assert equal(reading.continuous(pixels, mode="threshold"),
                 load_dynamic_tokenizer(tmp_path, True).continuous(pixels, mode="threshold"))
    assert [Path(r.source).name for r in reading.load_reports[-2:]] == ["visual_weight.bin"] * 2


def test_safetensors_serve_instead_of_bin_and_the_language_model_may_lie_elsewhere(tmp_path: Path) -> None:
    released(tmp_path)
    for file in sorted(tmp_path.rglob("*.bin")):
        save_file(torch.load(file), file.with_suffix(".safetensors"))
        file.unlink()
    (tmp_path / "language_model").rename(tmp_path / "language_model_sft")
    model = load_dynamic_tokenizer(tmp_path, understanding=True, language_model="language_model_sft")
    assert model.load_reports[2].source.endswith("language_model_sft/visual_weight.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model/visual_weight\.bin: there is no such file"):
        load_dynamic_tokenizer(tmp_path, understanding=True)


LACKING = [
    ("eva_vitg_psz14", "blocks.1.attn.q_bias", "encoder.blocks.1.attn.q_bias"),
    ("tokenizer_encoder", "token_predictor.out_conv.4.bias", ""),
    ("tokenizer_encoder", "causal_encoder.norm.weight", ""),
    ("tokenizer_encoder", "quantize.embedding.weight", ""),
    ("tokenizer_encoder", "encode_task_layer.2.bias", ""),
    ("visual_weight", "causal_encoder.blocks.0.norm1.bias", ""),
    ("visual_weight", "vit_proj.bias", ""),
    ("visual_weight", "vit_proj.weight", "vit_proj"),
]


@pytest.mark.parametrize(("file", "name", "told"), LACKING)
def test_each_file_must_hold_its_parts(file: str, name: str, told: str, tmp_path: Path) -> None:
    released(tmp_path, **{file: without(name)})
    with pytest.raises(CheckpointError, match=rf"{file}\.bin: .*{(told or name)}") as caught:
        load_dynamic_tokenizer(tmp_path, understanding=True)
    assert "missing" in str(caught.value)
    if file == "visual_weight":
        with pytest.raises(CheckpointError, match=rf"{file}\.bin: .*missing from the file: '{name}'"):
            load_both(tmp_path)


def test_a_tensor_of_another_size_and_an_unknown_one(tmp_path: Path) -> None:
    released(tmp_path, tokenizer_encoder={"quantize.embedding.weight": torch.ones(21, 4)})
    with pytest.raises(CheckpointError, match=r"'quantize.embedding.weight': the file has \(21, 4\)"):
        load_dynamic_tokenizer(tmp_path)
    released(tmp_path, tokenizer_encoder={"other.weight": torch.ones(1), "quantize.ema_count": torch.ones(20)})
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 'other.weight'"):
        load_dynamic_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["token_predictor.in_conv.1.weight", "encode_task_layer.2.bias",
                                  "quantize.embedding.weight"])
def test_weights_that_are_no_numbers_never_become_codes(name: str, tmp_path: Path, pixels: Tensor) -> None:
    damaged = torch.full_like(tiny_tokenizer().state_dict()[name], torch.nan)
    model = load_dynamic_tokenizer(released(tmp_path, tokenizer_encoder={name: damaged}))
    with pytest.raises(CheckpointError, match=f"its tensor {name} holds NaN"):
        model.encode(pixels, mode="threshold")


def test_tower_in_the_second_file_lies_over_the_first(tmp_path: Path) -> None:
    token = torch.full_like(tiny_tokenizer().encoder.cls_token, 3.0)
    model = load_dynamic_tokenizer(released(tmp_path, tokenizer_encoder={"encoder.cls_token": token}))
    assert torch.equal(model.encoder.cls_token, token)


def test_pickles_with_more_than_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"code": Path}, released(tmp_path) / "visual_tokenizer" / "tokenizer_encoder.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_dynamic_tokenizer(tmp_path)


def test_half_precision_is_for_layers_alone(tmp_path: Path) -> None:
    model = load_dynamic_tokenizer(released(tmp_path), True, dtype=torch.bfloat16)
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {"encoder.patch_embed.proj.weight", "vit_proj.bias", "causal_encoder.blocks.0.mlp.fc1.weight"} <= halves
    assert not any(part in name for name in halves for part in ("norm", "q_bias", "pos_embed", "quantize", "in_conv.0"))


def test_own_folder_returns_equal(tmp_path: Path, pixels: Tensor) -> None:
    saved = tiny_tokenizer()
    model = load_dynamic_tokenizer(save_dynamic_tokenizer(saved, tmp_path), understanding=True)
    assert model.config == TINY
    assert equal(list(model.state_dict().values()), list(saved.state_dict().values()))
    one, other = load_both(tmp_path)
    assert one is other and equal(one.continuous(pixels, mode="threshold"), saved.continuous(pixels, mode="threshold"))


def test_own_folder_with_two_mergers(tmp_path: Path, pixels: Tensor) -> None:
    first, second = tiny_tokenizer(0), tiny_tokenizer(0)
    other = tiny_tokenizer(1)
    second.causal_encoder, second.vit_proj = other.causal_encoder, other.vit_proj
    save_dynamic_tokenizer(first, tmp_path, second)
    for reading in (load_both(tmp_path)[1], load_dynamic_tokenizer(tmp_path, True)):
        assert equal(reading.continuous(pixels, mode="threshold"), second.continuous(pixels, mode="threshold"))
    assert equal(load_dynamic_tokenizer(tmp_path).encode(pixels, mode="threshold"),
                 first.encode(pixels, mode="threshold"))
    save_dynamic_tokenizer(first, tmp_path)
    assert load_both(tmp_path)[0] is not load_both(tmp_path)[1], "a second merger stays until it is removed"


def test_a_tower_that_another_system_holds(tmp_path: Path, pixels: Tensor) -> None:
    model = tiny_tokenizer(0)
    other = tmp_path / "nano" / "model.safetensors"
    other.parent.mkdir()
    save_file({"other.weight": torch.ones(2), **{f"visual_{name}": value for name, value in model.state_dict().items()
                                                 if name.startswith("encoder.")}}, other)
    place = save_dynamic_tokenizer(model, tmp_path / "own", tower=(other, "visual_encoder."))
    assert not [name for name in load_file(place / "model.safetensors") if name.startswith("encoder.")]
    again = load_dynamic_tokenizer(place, understanding=True)
    assert equal(again.encode(pixels, mode="threshold"), model.encode(pixels, mode="threshold"))
    assert equal(again.continuous(pixels, mode="threshold"), model.continuous(pixels, mode="threshold"))
    other.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"tower.json: names the file \S+ for the vision encoder"):
        load_dynamic_tokenizer(place)


def test_states_of_training_are_not_written_and_a_missing_projector_stays_missing(tmp_path: Path) -> None:
    model = DynamicTokenizer(TINY, ema_decay=0.9)
    model.vit_proj = None
    save_dynamic_tokenizer(model, tmp_path)
    assert not any("ema" in name or "vit_proj" in name for name in load_file(tmp_path / "model.safetensors"))
    assert load_dynamic_tokenizer(tmp_path).vit_proj is None
    with pytest.raises(CheckpointError, match="vit_proj"):
        load_dynamic_tokenizer(tmp_path, understanding=True)


def test_folders_that_hold_nothing_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such LaVIT folder; download rain1011"):
        load_dynamic_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"eva_vitg_psz14\.bin: there is no such file"):
        load_dynamic_tokenizer(tmp_path)
    save_dynamic_tokenizer(tiny_tokenizer(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_dict(), "llm_with": 3}))
    with pytest.raises(ConfigError, match="llm_width"):
        load_dynamic_tokenizer(tmp_path)


def test_sizes_are_read_off_the_released_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        whole = DynamicTokenizer(LavitTokenizerConfig()).state_dict()
    assert infer_config(whole, "released") == LavitTokenizerConfig()
    (released(tmp_path) / "visual_tokenizer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="width 16 is not the released one"):
        load_dynamic_tokenizer(tmp_path)
    assert load_dynamic_tokenizer(tmp_path, config=TINY).config == TINY
