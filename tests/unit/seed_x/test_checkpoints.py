"""SEED-X's networks in every layout: agent, vision encoder, de-tokenizer, and the encoder from
Qwen-VL-Chat's shards (outputs, losses and gradients: golden kinds `seedx_lvlm`, `seedx_visual`,
`seedx_sdxl_adapter`; training: `unit/training/seed_x`)."""

import pytest
import torch
from tensors import equal
from tiny import spread, write_json
from tiny.diffusion import RESAMPLER, random_adapter, write_sdxl
from tiny.language import random_llm
from tiny.seed_x import TOWER, VIEW, random_agent, write_qwen_vl
from torch import Tensor

from seed_multimodal.compat.weight_programs import reload_script
from seed_multimodal.diffusion.training import reads_images
from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed_x.adapter import SDXLAdapter
from seed_multimodal.models.seed_x.modeling import ContinuousLVLM, load_agent
from seed_multimodal.nn.vision.qwen import IN_QWEN_VL, QwenVit


def agent_of(seed=0) -> ContinuousLVLM:
    return random_agent(random_llm("llama", 40, seed), seed)


def tensors_of(agent: ContinuousLVLM, llm: bool = True) -> dict[str, Tensor]:
    state = agent.state_dict()
    return {name: state[name].clone() for name in state if llm or not name.startswith("llm.")}


@pytest.mark.parametrize("layout", ["file", "folder", "whole"])
def test_load_agent_layouts(layout, tmp_path):
    # The original's agents come without the language model, or saved from a DDP wrapper with it
    # and buffers of older transformers.
    tensors = tensors_of(agent_of(), llm=layout == "whole")
    file = tmp_path / "pytorch_model.bin"
    if layout == "whole":
        rotary = {"llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save({f"module.{name}": value for name, value in (tensors | rotary).items()}, file)
    else:
        torch.save(tensors, file)
    target = agent_of(seed=1)
    before = tensors_of(target)
    load_agent(target, tmp_path if layout == "folder" else file)
    assert equal(before | tensors, target.state_dict())


def test_load_agent_of_another_file_changes_nothing(tmp_path):
    # A refused file must leave the model as it was.
    model = agent_of(seed=1)
    before = tensors_of(model)
    torch.save({**tensors_of(agent_of()), "unet.x": torch.ones(1)}, tmp_path / "agent.bin")
    with pytest.raises(CheckpointError, match=r"unet\.x"):
        load_agent(model, tmp_path / "agent.bin")
    assert equal(before, model.state_dict())


@pytest.fixture
def encoder() -> QwenVit:
    torch.manual_seed(0)
    return spread(QwenVit(TOWER), 0.4).requires_grad_(False).eval()


@pytest.mark.parametrize("layout", ["file", "folder", "in Qwen-VL", "saved folder", "saved file"])
def test_vision_encoder_layouts(encoder, tmp_path, layout):
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


def test_vision_encoder_without_sizes_has_the_original_ones(encoder, tmp_path):
    # The folder's config.json is another model's.
    torch.save(encoder.state_dict(), tmp_path / "qwen_vit_G.pt")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(CheckpointError, match="another size"):
        QwenVit.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "original folder", "saved folder"])
def test_adapter_layouts(name, tmp_path):
    # Each layout of the original and ours has the same weights.
    adapter = random_adapter(2)
    state = adapter.state_dict()
    path = tmp_path if "folder" in name else tmp_path / name
    write_json(tmp_path / "resampler.json", vars(RESAMPLER))
    if name == "saved folder":
        adapter.save_pretrained(tmp_path)
    else:
        file = tmp_path / "pytorch_model.bin" if path == tmp_path else path
        torch.save({"module": state}, file)
    loaded = SDXLAdapter.from_pretrained(path, write_sdxl(tmp_path / "sdxl", complete=False))
    assert reads_images(loaded.unet)
    assert not loaded.training
    assert equal(loaded.state_dict(), state)


@pytest.mark.parametrize("torch_files", [True, False])
def test_reload_of_shards_in_both_formats(torch_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "pretrained" / "Qwen-VL-Chat"
    encoder = write_qwen_vl(source, torch_files=torch_files)
    language, vision, *_ = sorted(source.glob("*-of-*"))
    language.unlink()  # is not needed
    assert reload_script([]) == 0
    file = tmp_path / "pretrained" / "QwenViT" / "qwen_vit_G.pt"
    loaded = QwenVit.from_pretrained(file, config=TOWER)
    assert equal(encoder.float().state_dict(), loaded.state_dict())

    # It replaces nothing unasked, and names what is missing.
    assert reload_script([]) == 2
    vision.unlink()
    assert reload_script(["--force"]) == 2
    assert vision.name in capsys.readouterr().err
