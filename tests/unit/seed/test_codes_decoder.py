"""A SEED-LLaMA whose diffusion folder reads the embeddings of the codes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_decoder
import tiny_system
import torch
from PIL import Image

from seed_multimodal import MultimodalSystem
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer

SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def system(tiny_folder: Path, tmp_path_factory) -> MultimodalSystem:
    folder = tmp_path_factory.mktemp("codes") / "system"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "seed_tokenizer" / "diffusion_model")
    tiny_decoder.write_decoder(folder / "seed_tokenizer" / "diffusion_model")
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None)


def difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, np.int32) - np.asarray(second, np.int32)).max())


def test_draw_of_codes(system: MultimodalSystem):
    """From all or the first codes, with negative ones, by either preset, alone or in a batch."""
    codec = system.images
    assert isinstance(codec.decoder, CodesDetokenizer) and codec.decoder.reads_codes
    codes = torch.randint(
        0, tiny_system.N_CODES, (2, 32), generator=torch.Generator().manual_seed(0)
    )
    both = codec.draw(codes, seeds=[1, 2], **SETTINGS)
    alone = codec.draw(codes[1:], seeds=[2], **SETTINGS)
    assert both[0].size == (16, 16) and difference(both[1], alone[0]) <= 1
    first = codec.draw(codes[:1], seeds=[1], **SETTINGS)
    for changes in ({"codes": 8}, {"negative_codes": codes[1]}, {"preset": "fast"}):
        changed = codec.draw(codes[:1], seeds=[1], **SETTINGS, **changes)
        assert difference(changed[0], first[0]) > 0, changes
    with pytest.raises(ConfigError, match="unknown key 'noise_level'"):
        codec.check_drawing(noise_level=3)


def test_reconstruct_and_stream_previews(system: MultimodalSystem):
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    drawn = system.reconstruct([image], seed=3, **SETTINGS)[0]
    assert drawn.size == (16, 16)
    messages = [{"role": "user", "content": ["Draw an apple."]}]
    options = {"max_new_tokens": 40, "seed": 3, **SETTINGS}
    events = system.chat(messages, stream=True, force_image=True, previews=[8], **options)
    drawn_codes = [event["codes"] for event in events if event.get("codes") is not None]
    assert drawn_codes


def test_a_folder_that_lacks_its_adapters_weights(tmp_path):
    folder = tiny_decoder.write_decoder(tmp_path / "decoder")
    (folder / "code_adapter" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"code_adapter/model\.safetensors: no such file"):
        CodesDetokenizer.from_pretrained(folder)
