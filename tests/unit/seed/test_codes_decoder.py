"""SEED-LLaMA's image codec: numbers of codes, a diffusion folder that reads their embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from random_images import noise, same
from tiny.seed import N_CODES, write_code_decoder

from seed_multimodal import MultimodalSystem
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer

SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def system(tiny_folder: Path, tmp_path_factory) -> MultimodalSystem:
    folder = tmp_path_factory.mktemp("codes") / "system"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "seed_tokenizer" / "diffusion_model")
    write_code_decoder(folder / "seed_tokenizer" / "diffusion_model")
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None)


def test_draw_reads_codes(system):
    # All or the first codes, with negative ones, by either preset, alone or in a batch.
    codec = system.images
    assert isinstance(codec.decoder, CodesDetokenizer)
    codes = torch.randint(0, N_CODES, (2, 32), generator=torch.Generator().manual_seed(0))
    first, second = codec.draw(codes, seeds=[1, 2], **SETTINGS)
    assert first.size == (16, 16)
    assert same(second, codec.draw(codes[1:], seeds=[2], **SETTINGS)[0])
    for changes in ({"codes": 8}, {"negative_codes": codes[1]}, {"preset": "fast"}):
        changed = codec.draw(codes[:1], seeds=[1], **SETTINGS, **changes)[0]
        assert changed.tobytes() != first.tobytes(), changes
    with pytest.raises(ConfigError, match="noise_level"):
        codec.check_drawing(noise_level=3)

    # Each row has as many codes as its image uses.
    rows = [codes[0, :16], codes[1]]
    assert len(codec.draw(rows, seeds=[0, 0], codes=[16, 32], **SETTINGS)) == 2
    with pytest.raises(CodesError, match="Image 1"):
        codec.draw([codes[0, :16]] * 2, seeds=[0, 0], codes=[16, 32])


def test_reconstruct_and_stream_previews(system):
    # Previews of the first codes, then the whole image.
    assert system.reconstruct([noise(1)], seed=3, **SETTINGS)[0].size == (16, 16)
    messages = [{"role": "user", "content": ["Draw an apple."]}]
    options = {"max_new_tokens": 40, "seed": 3, **SETTINGS}
    events = system.chat(messages, stream=True, force_image=True, previews=[8], **options)
    assert [len(event["codes"]) for event in events if event.get("codes") is not None] == [8, 32]


def test_a_folder_that_lacks_its_adapters_weights(tmp_path):
    # Half a download is named, not drawn with.
    folder = write_code_decoder(tmp_path / "decoder")
    (folder / "code_adapter" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"code_adapter/model\.safetensors"):
        CodesDetokenizer.from_pretrained(folder)
