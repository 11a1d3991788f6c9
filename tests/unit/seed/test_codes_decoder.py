"""SEED-LLaMA's image codec: numbers of codes, a diffusion folder that reads their embeddings."""

import shutil

import pytest
import torch
from random_images import same
from systems import load
from tiny.seed import N_CODES, write_code_decoder

from seed_multimodal.errors import CodesError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer

SETTINGS = {"num_inference_steps": 2}


def test_draw_reads_codes(tiny_folder, tmp_path):
    # All or the first codes, with negative ones.
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    decoder = tmp_path / "seed_tokenizer" / "diffusion_model"
    shutil.rmtree(decoder)
    write_code_decoder(decoder)
    codec = load(tmp_path).images
    assert isinstance(codec.decoder, CodesDetokenizer)
    codes = torch.randint(0, N_CODES, (2, 32), generator=torch.Generator().manual_seed(0))
    [image] = codec.draw(codes[:1], seeds=[1], **SETTINGS)
    for changes in ({"codes": 8}, {"negative_codes": codes[1]}):
        [changed] = codec.draw(codes[:1], seeds=[1], **SETTINGS, **changes)
        assert changed.tobytes() != image.tobytes(), changes

    # Each row has as many codes as its image uses.
    rows = [codes[1, :16], codes[0]]
    drawn = codec.draw(rows, seeds=[1, 1], codes=[16, 32], **SETTINGS)
    assert same(drawn[1], image)
    with pytest.raises(CodesError, match="Image 1"):
        codec.draw([codes[0, :16]] * 2, seeds=[0, 0], codes=[16, 32])
