"""The agent's checkpoints: every released and trained form loads whole, everything else is one sentence."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.agent_weights import load_agent
from seed_multimodal.language.continuous import ContinuousLVLM
from seed_multimodal.vision.resampler import Resampler, ResamplerConfig

ROTARY = "llm.model.layers.0.self_attn.rotary_emb.inv_freq"


def agent_of(seed: int, width: int = 16, lora: bool = False) -> ContinuousLVLM:
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=width, intermediate_size=24, num_hidden_layers=1,
                                       num_attention_heads=2))
    if lora:
        llm = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                             modules_to_save=["input_layernorm", "norm"]))
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return ContinuousLVLM(llm, Resampler(ResamplerConfig(2, width, 2, 8)), Resampler(ResamplerConfig(2, 8, 2, width)))


def own_tensors(agent: ContinuousLVLM, with_llm: bool = True) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in agent.state_dict().items()
            if with_llm or not name.startswith("llm.")}


def same(agent: ContinuousLVLM, tensors: Mapping[str, Tensor]) -> bool:
    state = agent.state_dict()
    return all(torch.equal(state[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_the_23_tensors_leave_the_language_model_alone(name: str, tmp_path: Path) -> None:
    source, target = agent_of(0), agent_of(1)
    tensors, llm = own_tensors(source, with_llm=False), own_tensors(target)
    assert len(tensors) == 23
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    for place in (tmp_path / name, tmp_path):  # the file or its folder
        assert len(load_agent(target, place).loaded) == 23 and same(target, tensors)
    assert same(target, {name: value for name, value in llm.items() if name.startswith("llm.")})


def test_with_the_language_model_and_a_wrapper_in_the_names(tmp_path: Path) -> None:
    source, target = agent_of(0), agent_of(1)
    tensors = own_tensors(source)
    written = {**tensors, ROTARY: torch.ones(4)}
    torch.save({f"module.{name}": value for name, value in written.items()}, tmp_path / "a.bin")
    load_agent(target, tmp_path / "a.bin")
    assert same(target, tensors)


def old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As peft 0.4 wrote them."""
    return {name.replace(".base_layer.", "."): value for name, value in tensors.items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_zero_to_fp32_writes_of_a_lora(old: bool, frozen: bool, tmp_path: Path) -> None:
    """A folder of shards with an index, with or without the frozen tensors, in the names of old and new peft."""
    source, target = agent_of(0, lora=True), agent_of(1, lora=True)
    trained = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
    tensors = {name: value for name, value in own_tensors(source).items() if frozen or name in trained}
    if not frozen:  # SEED-X trains these beside the LoRA
        tensors |= {name: value for name, value in own_tensors(source).items()
                    if ("base_layer" not in name and "original_module" not in name and "resampler" not in name)}
    written = old_names(tensors) if old else tensors
    folder = tmp_path / "pytorch_model.bin"
    folder.mkdir()
    names = sorted(written)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: written[name] for name in part}, folder / file)
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    load_agent(target, folder)
    assert same(target, tensors)
    assert frozen or not same(target, own_tensors(source))


def refused(agent: ContinuousLVLM, tensors: Mapping[str, Tensor], message: str, place: Path) -> None:
    torch.save(dict(tensors), place / "agent.bin")
    before = copy.deepcopy(own_tensors(agent))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_agent(agent, place / "agent.bin")
    assert str(caught.value).startswith(str(place)) and str(caught.value).count("\n") == 0
    assert same(agent, before)


def test_checkpoints_that_do_not_belong(tmp_path: Path) -> None:
    agent, tensors = agent_of(1), own_tensors(agent_of(0), with_llm=False)
    everything = own_tensors(agent_of(0))
    refused(agent, own_tensors(agent_of(0, width=32), with_llm=False),
            r"tensors have another size, first 'patch_pos_embed': the file has \(4, 32\), the model needs \(4, 16\)",
            tmp_path)
    short = {name: value for name, value in tensors.items() if name != "patch_pos_embed"}
    refused(agent, short, "1 tensors are missing from the file: 'patch_pos_embed'", tmp_path)
    half = {name: value for name, value in tensors.items() if name != "input_resampler.pos_embed"}
    refused(agent, half, "missing from the file: 'input_resampler.pos_embed'", tmp_path)
    refused(agent, {**tensors, "unet.x": torch.ones(1)}, "unknown to the model: 'unet.x'", tmp_path)
    refused(agent, {name: value for name, value in everything.items() if "lm_head" not in name},
            "missing from the file: 'llm.lm_head.weight'", tmp_path)
    refused(agent, {"unet.x": torch.ones(1)}, "a checkpoint of another model", tmp_path)
    refused(agent, own_tensors(agent_of(0, lora=True)), "with a LoRA, but this one has none", tmp_path)
    tuned = agent_of(1, lora=True)
    refused(tuned, everything, "without a LoRA, but this one has one", tmp_path)
    partly = own_tensors(agent_of(0, lora=True))
    frozen = next(name for name in partly if ".base_layer." in name)
    refused(tuned, {name: value for name, value in partly.items() if name != frozen}, "missing from the file", tmp_path)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        load_agent(agent, tmp_path / "nowhere")
    (tmp_path / "bad.bin").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="bad.bin"):
        load_agent(agent, tmp_path / "bad.bin")


def test_from_pretrained_reads_the_released_settings(tmp_path: Path) -> None:
    source = agent_of(0)
    torch.save(own_tensors(source, with_llm=False), tmp_path / "pytorch_model.bin")
    other = agent_of(1)
    agent = ContinuousLVLM.from_pretrained(
        other.llm, other.input_resampler, other.output_resampler, tmp_path, lm_loss_scale=1.0, rec_loss_scale=3.0,
        add_patch_pos=True, vit_down=True, mse=True)
    assert agent.settings.rec_loss_scale == 3.0 and same(agent, own_tensors(source, with_llm=False))
