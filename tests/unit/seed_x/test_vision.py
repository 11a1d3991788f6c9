"""Files of SEED-X's vision encoder (activations: golden kind `seedx_visual`; batches:
`contract/test_systems.py`)."""

import pytest
import torch
from tiny import spread
from tiny.seed_x import TOWER, VIEW

from seed_multimodal.errors import CheckpointError
from seed_multimodal.nn.vision.qwen import IN_QWEN_VL, QwenVit


@pytest.fixture
def encoder() -> QwenVit:
    torch.manual_seed(0)
    return spread(QwenVit(TOWER), 0.4).requires_grad_(False).eval()


@pytest.mark.parametrize("layout", ["file", "folder", "in Qwen-VL", "saved folder", "saved file"])
def test_from_pretrained_layouts(encoder, tmp_path, layout):
    # Our folder needs no sizes in code.
    config = None if layout.startswith("saved") else TOWER
    file = tmp_path / "qwen_vit_G.pt"
    if config is None:
        file = encoder.save_pretrained(tmp_path) / "model.safetensors"
    else:
        prefix = IN_QWEN_VL if layout == "in Qwen-VL" else ""
        torch.save({prefix + name: value for name, value in encoder.state_dict().items()}, file)
    source = tmp_path if "folder" in layout else file
    loaded = QwenVit.from_pretrained(source, config=config, dtype=torch.bfloat16)
    images = torch.randn(2, 3, VIEW, VIEW)
    assert torch.equal(loaded(images), encoder.to(torch.bfloat16)(images))
    assert loaded.config == TOWER
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())


def test_from_pretrained_without_sizes_has_the_original_ones(encoder, tmp_path):
    # The folder's config.json is another model's.
    torch.save(encoder.state_dict(), tmp_path / "qwen_vit_G.pt")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(CheckpointError, match="another size"):
        QwenVit.from_pretrained(tmp_path)
