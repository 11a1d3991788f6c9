"""LaVIT's decoder at a tiny size: padding, gradients, its files (values: golden kind
`lavit_decoder`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny.lavit import DECODER
from torch import Tensor

from seed_multimodal.models.lavit.decoder import CodeDecoder


def decoder(head: str = "highres", seed: int = 0, **changes: bool) -> CodeDecoder:
    torch.manual_seed(seed)
    model = CodeDecoder(dataclasses.replace(DECODER, head=head, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def code_rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, DECODER.code_dim, generator=generator) for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_forward_does_not_depend_on_batches(head):
    # Images have different numbers of codes; padding must not change their conditions.
    model = decoder(head)
    images = code_rows(3, 16, 1, 9)
    together = model(images)
    assert (together.pooled is None) == (head == "lowres")
    for index, rows in enumerate(images):
        alone = model([rows])
        prompt = together.prompt_embeds[index]
        torch.testing.assert_close(alone.prompt_embeds[0], prompt, atol=1e-5, rtol=1e-4)
        if together.pooled is not None:
            pooled = together.pooled[index]
            torch.testing.assert_close(alone.pooled[0], pooled, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter_with_and_without_checkpointing():
    # Recomputed activations give the same gradients.
    plain = decoder()
    again = decoder(grad_checkpoint=True)
    for model in (plain, again):
        conditions = model(code_rows(3, 5))
        (conditions.prompt_embeds.square().mean() + conditions.pooled.square().mean()).backward()
    for (name, first), second in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert first.grad.abs().sum() > 0, name
        torch.testing.assert_close(first.grad, second.grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_from_pretrained_layouts(tmp_path):
    high = decoder("highres")
    low = decoder("lowres", seed=1)
    rows = code_rows(3)
    expected = high(rows).prompt_embeds
    high.save_pretrained(tmp_path / "saved")
    half = CodeDecoder.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    embeds = half(rows).prompt_embeds
    assert half.config == high.config
    assert embeds.dtype == torch.bfloat16
    assert torch.cosine_similarity(embeds.float().flatten(), expected.flatten(), dim=0) > 0.995

    # The original folder holds one file for each head.
    original = tmp_path / "LaVIT" / "visual_tokenizer"
    original.mkdir(parents=True)
    torch.save(high.state_dict(), original / "highres_tokenizer_decoder.bin")
    torch.save(low.state_dict(), original / "tokenizer_decoder.bin")
    for folder in (tmp_path / "LaVIT", original):
        for head, model in (("highres", high), ("lowres", low), (None, high)):
            loaded = CodeDecoder.from_pretrained(folder, head=head, config=DECODER)
            assert loaded.config.head == model.config.head
            assert torch.equal(loaded(rows).prompt_embeds, model(rows).prompt_embeds)
