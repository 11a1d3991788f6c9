"""LaVIT's decoder at a tiny size: padding, gradients, its files (values: golden kind
`lavit_decoder`)."""

from __future__ import annotations

import dataclasses

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
def test_from_pretrained_layouts(tmp_path):
    # Our folder, and the original's: one file for each head.
    high = decoder("highres")
    low = decoder("lowres", seed=1)
    saved = high.save_pretrained(tmp_path / "saved")
    original = tmp_path / "LaVIT" / "visual_tokenizer"
    original.mkdir(parents=True)
    torch.save(high.state_dict(), original / "highres_tokenizer_decoder.bin")
    torch.save(low.state_dict(), original / "tokenizer_decoder.bin")
    rows = code_rows(3)
    for folder, head, config, model in (
        (saved, None, None, high),
        (original.parent, None, DECODER, high),
        (original.parent, "lowres", DECODER, low),
        (original, "highres", DECODER, high),
    ):
        loaded = CodeDecoder.from_pretrained(folder, head=head, config=config)
        assert loaded.config == model.config
        assert torch.equal(loaded(rows).prompt_embeds, model(rows).prompt_embeds)
