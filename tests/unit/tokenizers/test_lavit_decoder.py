"""LaVIT's decoder: sizes, invariance to padding, loading of the released files and of our own folder, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder, LavitDecoderConfig

SIZES = {"tokens": 16, "code_dim": 8, "width": 32, "depth": 2, "heads": 4, "mlp_width": 48, "feature_dim": 24,
         "prompt_dim": 12, "pooled_dim": 20}


def decoder(head: str = "highres", seed: int = 0) -> CodeDecoder:
    torch.manual_seed(seed)
    made = CodeDecoder(LavitDecoderConfig(head=head, **SIZES))  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, SIZES["code_dim"], generator=generator) for length in lengths]


@pytest.mark.parametrize(("head", "keys", "parameters"), [("highres", 287, 414.0e6), ("lowres", 276, 404.1e6)])
def test_released_sizes(head, keys, parameters):
    with torch.device("meta"):
        state = CodeDecoder(LavitDecoderConfig(head=head)).state_dict()
    assert len(state) == keys
    assert sum(value.numel() for value in state.values()) == pytest.approx(parameters, abs=0.05e6)
    assert tuple(state["blocks.11.mlp.fc1.weight"].shape) == (6144, 1408)


@pytest.mark.parametrize("head", ["highres", "lowres"])
@torch.no_grad()
def test_a_picture_alone_is_as_in_a_batch(head):
    """Whatever the others' lengths: the padding of a shorter picture is not seen at all."""
    model, pictures = decoder(head), rows(3, 16, 1, 9)
    together = model(pictures)
    for number, one in enumerate(pictures):
        alone = model([one])
        assert torch.allclose(alone.prompt_embeds[0], together.prompt_embeds[number], atol=1e-5)
        if head == "highres":
            assert torch.allclose(alone.pooled[0], together.pooled[number], atol=1e-5)
    assert together.prompt_embeds.shape == (4, 16, 32 if head == "highres" else 12)
    assert (together.pooled is None) == (head == "lowres")
    assert not torch.allclose(together.prompt_embeds[0], together.prompt_embeds[1], atol=1e-2)


@torch.no_grad()
def test_the_position_of_a_row_is_its_rank():
    model, (one,) = decoder(), rows(4)
    changed = model([one.flip(0)]).prompt_embeds
    assert not torch.allclose(model([one]).prompt_embeds, changed, atol=1e-3)
    with torch.no_grad():
        model.pos_embed.zero_()
    assert torch.allclose(model([one]).prompt_embeds, model([one.flip(0)]).prompt_embeds, atol=1e-5)


def test_every_parameter_is_trained_by_the_conditions_and_recomputing_changes_nothing():
    plain, pictures = decoder(), rows(3, 5)
    again = CodeDecoder(LavitDecoderConfig(grad_checkpoint=True, **SIZES))
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        made = model(pictures)
        (made.prompt_embeds.square().mean() + made.pooled.square().mean()).backward()
    for (name, first), second in zip(plain.named_parameters(), again.parameters(), strict=True):
        if name != "pos_embed":
            assert first.grad is not None and first.grad.abs().sum() > 0, name
        assert torch.allclose(first.grad, second.grad, atol=1e-6), name
    assert plain.pos_embed.grad[:, :5].abs().sum() > 0 and not plain.pos_embed.grad[:, 5:].any()


@torch.no_grad()
def test_half_precision_stays_near(tmp_path):
    model, pictures = decoder(), rows(3, 16)
    model.save_pretrained(tmp_path)
    half = CodeDecoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made, want = half(pictures).prompt_embeds, model(pictures).prompt_embeds
    assert made.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(made.float().flatten(), want.flatten(), dim=0) > 0.995


@torch.no_grad()
def test_own_folder_and_released_files(tmp_path):
    high, low = decoder("highres"), decoder("lowres", seed=1)
    high.save_pretrained(tmp_path / "own", torch.float16)
    assert "grad_checkpoint" not in json.loads((tmp_path / "own" / "config.json").read_text())
    assert CodeDecoder.from_pretrained(tmp_path / "own").config == high.config
    released = tmp_path / "LaVIT" / "visual_tokenizer"
    released.mkdir(parents=True)
    torch.save(high.state_dict(), released / "highres_tokenizer_decoder.bin")
    torch.save(low.state_dict(), released / "tokenizer_decoder.bin")
    sizes = LavitDecoderConfig(**SIZES)
    for place in (tmp_path / "LaVIT", released):
        for head, model in (("highres", high), ("lowres", low), (None, high)):
            found = CodeDecoder.from_pretrained(place, head=head, config=sizes)
            assert found.config.head == model.config.head and not found.training
            assert torch.equal(found(rows(3)).prompt_embeds, model(rows(3)).prompt_embeds)
            assert len(found.load_report.loaded) == len(model.state_dict())


def test_wrong_files_are_one_sentence(tmp_path):
    model, file = decoder(), tmp_path / "highres_tokenizer_decoder.bin"
    with pytest.raises(CheckpointError, match="rain1011/LaVIT-7B-v2"):
        CodeDecoder.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no tokenizer_decoder.bin or model.safetensors"):
        CodeDecoder.from_pretrained(tmp_path, head="lowres")
    torch.save(model.state_dict(), file)
    with pytest.raises(CheckpointError, match="tensors have another size"):
        CodeDecoder.from_pretrained(file)
    with pytest.raises(CheckpointError, match="holds the highres decoder, not the lowres one"):
        CodeDecoder.from_pretrained(file, head="lowres", config=LavitDecoderConfig(**SIZES))
    state = model.state_dict()
    del state["query_embed"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="1 tensors are missing from the file: 'query_embed'"):
        CodeDecoder.from_pretrained(file, config=LavitDecoderConfig(**SIZES))
    torch.save({**model.state_dict(), "more": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="unknown to the model: 'more'"):
        CodeDecoder.from_pretrained(file, config=LavitDecoderConfig(**SIZES))
    torch.save({"model": Path}, file)
    with pytest.raises(CheckpointError, match="more than tensors"):
        CodeDecoder.from_pretrained(file)


def test_wrong_rows_are_one_sentence():
    model = decoder()
    with pytest.raises(CodesError, match="list with the codebook rows of one picture or more"):
        model([])
    with pytest.raises(CodesError, match="list with the codebook rows"):
        model(torch.zeros(2, 3, 8))
    with pytest.raises(CodesError, match="Picture 2 has no codes"):
        model(rows(3, 0))
    with pytest.raises(CodesError, match="Picture 1 has 17 codes, but LaVIT's decoder takes 16 of a picture at most"):
        model(rows(17))
    with pytest.raises(CodesError, match=r"picture 1 must be a floating tensor \[n, 8\], got \[3, 7\]"):
        model([torch.zeros(3, 7)])
    with pytest.raises(CodesError, match="floating tensor"):
        model([torch.zeros(3, 8, dtype=torch.long)])
    with pytest.raises(ConfigError, match="does not divide into 5 heads"):
        LavitDecoderConfig(**{**SIZES, "heads": 5})
