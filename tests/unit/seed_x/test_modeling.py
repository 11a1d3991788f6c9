"""The agent's weights on a tiny random LLaMA (losses: golden kind `seedx_lvlm`; gradients:
`unit/training/seed_x/test_tuning.py`)."""

import pytest
import torch
from tensors import equal
from tiny.language import random_llm
from tiny.seed_x import random_agent
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed_x.modeling import ContinuousLVLM, load_agent


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
