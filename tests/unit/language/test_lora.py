"""`merge_adapter`: equal to peft for every form of base and adapter; nothing is written after an
error."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_json
from tiny.language import random_llm
from torch import Tensor
from yaml_tables import read_tables

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llm import load_llm
from seed_multimodal.language.lora import merge_adapter

LORA = read_tables(__file__)
N_TEXT = 330  # rows of a base without image tokens
N_ALL = 356  # of the tokenizer
SAMPLE = torch.arange(3, 353, 7)[None]


@dataclass
class Trained:
    """A base, an adapter of it, and the model as peft trained it."""

    base: Path
    adapter: Path
    model: Any

    @property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=SAMPLE).logits

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.adapter / "adapter_model.safetensors")


def train(folder, n_base, lora: dict, **config) -> Trained:
    """Write a base and an adapter with random changes of every number, for `N_ALL` tokens."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    base = folder / "base"
    # Special ids of the legacy conversion, which a merged model must not keep.
    llm = random_llm("llama", n_base, bos_token_id=0, eos_token_id=1, **config)
    llm.save_pretrained(base)
    if n_base != N_ALL:
        llm.resize_token_embeddings(N_ALL, mean_resizing=False)
    values = {**LORA, **lora}
    model = get_peft_model(llm, LoraConfig(**copy.deepcopy(values)))  # peft changes its arguments
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter = folder / "adapter"
    adapter.mkdir()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value.clone() for name, value in state.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    write_json(
        adapter / "adapter_config.json",
        {**values, "peft_type": "LORA", "base_model_name_or_path": str(base)},
    )
    return Trained(base, adapter, model.eval())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), N_TEXT, {})


def check_logits(expected: Tensor, llm):
    with torch.no_grad():
        logits = llm(input_ids=SAMPLE).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_merge_adapter_equals_peft(trained, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    merge_adapter(trained.base, trained.adapter, out, tokenizer=tokenizer, max_shard_size="40KB")
    assert (out / "model.safetensors.index.json").is_file()
    state = {}
    for file in out.glob("*.safetensors"):
        state |= load_file(file)
    expected = copy.deepcopy(trained.model).merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    # Also transformers reads the folder, with the tokenizer's ids.
    for llm in (load_llm(out), AutoModelForCausalLM.from_pretrained(out)):
        check_logits(trained.logits, llm)
        assert (llm.config.bos_token_id, llm.config.eos_token_id) == (1, 2)
        assert llm.generation_config.eos_token_id == 2
    assert MultimodalTokenizer.from_pretrained(out).vocabulary.size == N_ALL
    assert list(tmp_path.iterdir()) == [out]


def as_zero_checkpoint(trained: Trained, folder) -> Path:
    """As `zero_to_fp32.py` writes what was trained."""
    folder.mkdir()
    parameters = trained.model.named_parameters()
    state = {f"module.llm.{name}": p.detach() for name, p in parameters if p.requires_grad}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def as_whole_model(trained: Trained, folder) -> Path:
    """As a fully trained model's checkpoint."""
    folder.mkdir()
    merged = copy.deepcopy(trained.model).merge_and_unload().state_dict()
    state = {f"module.llm.{name}": value for name, value in merged.items()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("write", [as_zero_checkpoint, as_whole_model])
def test_merge_adapter_of_every_checkpoint(trained, write, tmp_path):
    checkpoint = write(trained, tmp_path / "checkpoint")
    out = tmp_path / "out"
    merge_adapter(trained.base, checkpoint, out, lora=LORA)
    check_logits(trained.logits, load_llm(out))
    # Again, of a complete model, in another precision.
    merge_adapter(None, out, tmp_path / "half", dtype="bf16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(half[name], value.bfloat16())


Tensors = dict[str, Tensor]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UNKNOWN = "base_model.model.model.layers.9.mlp.up_proj.weight"


def without(text) -> Callable[[Tensors], Tensors]:
    return lambda state: {name: value for name, value in state.items() if text not in name}


@pytest.mark.parametrize(
    "change, named",
    [
        (without(A), "q_proj"),
        (lambda state: {**state, A: torch.zeros(3, 32)}, "adapter"),
        (lambda state: {**state, UNKNOWN: torch.zeros(2, 2)}, "layers.9"),
        (without("lm_head"), "330"),  # the tokenizer has 356
    ],
)
def test_merge_adapter_of_other_tensors_writes_nothing(trained, tokenizer, change, named, tmp_path):
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    save_file(change(trained.tensors), adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        merge_adapter(trained.base, adapter, tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [adapter]


def test_merge_adapter_with_a_wrong_base_or_folder(trained, tmp_path):
    random_llm("llama", N_ALL, hidden_size=64).save_pretrained(tmp_path / "wide")
    run = shutil.copytree(trained.adapter, tmp_path / "run")
    with pytest.raises(CheckpointError, match="64"):
        merge_adapter(tmp_path / "wide", run, tmp_path / "out")
    with pytest.raises(ConfigError, match="base"):
        merge_adapter(None, run, tmp_path / "out")
    with pytest.raises(ConfigError, match="run"):  # the output would replace its input
        merge_adapter(trained.base, run, run, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "wide"]
