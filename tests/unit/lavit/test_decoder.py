"""LaVIT's decoder at a tiny size: padding, positions, gradients, its files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig

SIZES = {
    "tokens": 16,
    "code_dim": 8,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_width": 48,
    "feature_dim": 24,
    "prompt_dim": 12,
    "pooled_dim": 20,
}


def decoder(head: str = "highres", seed: int = 0, **sizes: bool) -> CodeDecoder:
    torch.manual_seed(seed)
    model = CodeDecoder(LavitDecoderConfig(head=head, **SIZES, **sizes))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def code_rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, SIZES["code_dim"], generator=generator) for length in lengths]


@pytest.mark.parametrize("head", ["highres", "lowres"])
@torch.no_grad()
def test_forward_does_not_depend_on_batches(head):
    model = decoder(head)
    images = code_rows(3, 16, 1, 9)
    together = model(images)
    for index, rows in enumerate(images):
        alone = model([rows])
        assert torch.allclose(alone.prompt_embeds[0], together.prompt_embeds[index], atol=1e-5)
        if head == "highres":
            assert torch.allclose(alone.pooled[0], together.pooled[index], atol=1e-5)
    assert together.prompt_embeds.shape == (4, 16, model.config.context_dim)
    assert (together.pooled is None) == (head == "lowres")


def test_gradients_reach_every_parameter_with_and_without_checkpointing():
    plain = decoder()
    again = decoder(grad_checkpoint=True)
    images = code_rows(3, 5)
    for model in (plain, again):
        conditions = model(images)
        (conditions.prompt_embeds.square().mean() + conditions.pooled.square().mean()).backward()
    for (name, first), second in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert first.grad is not None and first.grad.abs().sum() > 0, name
        assert torch.allclose(first.grad, second.grad, atol=1e-6), name


@torch.no_grad()
def test_from_pretrained_layouts(tmp_path):
    high = decoder("highres")
    low = decoder("lowres", seed=1)
    rows = code_rows(3)
    high.save_pretrained(tmp_path / "saved")
    half = CodeDecoder.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    embeds = half(rows).prompt_embeds
    assert half.config == high.config and embeds.dtype == torch.bfloat16
    assert (
        torch.cosine_similarity(embeds.float().flatten(), high(rows).prompt_embeds.flatten(), dim=0)
        > 0.995
    )
    original = tmp_path / "LaVIT" / "visual_tokenizer"
    original.mkdir(parents=True)
    torch.save(high.state_dict(), original / "highres_tokenizer_decoder.bin")
    torch.save(low.state_dict(), original / "tokenizer_decoder.bin")
    for folder in (tmp_path / "LaVIT", original):
        for head, model in (("highres", high), ("lowres", low), (None, high)):
            loaded = CodeDecoder.from_pretrained(
                folder, head=head, config=LavitDecoderConfig(**SIZES)
            )
            assert loaded.config.head == model.config.head and not loaded.training
            assert torch.equal(loaded(rows).prompt_embeds, model(rows).prompt_embeds)


def test_from_pretrained_missing_files_and_other_sizes(tmp_path):
    with pytest.raises(CheckpointError, match="rain1011/LaVIT-7B-v2"):
        CodeDecoder.from_pretrained(tmp_path / "absent")
    torch.save(decoder().state_dict(), tmp_path / "highres_tokenizer_decoder.bin")
    with pytest.raises(CheckpointError, match="tensors have another size"):
        CodeDecoder.from_pretrained(tmp_path)
