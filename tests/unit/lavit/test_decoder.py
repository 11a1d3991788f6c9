"""The files of LaVIT's decoder (values: golden kind `lavit_decoder`)."""

import dataclasses

import torch
from tensors import equal
from tiny.lavit import DECODER

from seed_multimodal.models.lavit.decoder import CodeDecoder


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
