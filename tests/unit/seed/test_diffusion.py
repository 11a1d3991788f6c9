"""SEED's de-tokenizers: sizes, negatives, safety checker, layout (images as recorded: golden
`seed1_sd_decode`, `seed2_unclip_decode`)."""

import torch
from tiny.diffusion import EMBEDDING, write_unclip

from seed_multimodal import UnclipDetokenizer


@torch.no_grad()
def test_unclip_with_layout_has_an_unconditional_half_of_zeros(tmp_path):
    # Guidance would else go away from another image's layout.
    write_unclip(tmp_path / "unclip")
    model = UnclipDetokenizer.from_pretrained(tmp_path / "unclip")
    embeds = torch.randn(2, EMBEDDING)
    tokens = []
    model.unet.register_forward_pre_hook(
        lambda module, args, named: tokens.append(named["encoder_hidden_states"]),
        with_kwargs=True,
    )
    model(embeds, seeds=[1, 2], num_inference_steps=2)
    assert not tokens[0][:2].any()
    torch.testing.assert_close(tokens[0][2:], model.conditioner.tokens(embeds))
