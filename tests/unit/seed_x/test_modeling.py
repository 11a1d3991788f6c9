"""The agent on a tiny random LLaMA: gradients, weights (losses: golden kind `seedx_lvlm`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny.seed_x import write_seed_x_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.llm import force_special_ids
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed_x.losses import TrainedAgent
from seed_multimodal.models.seed_x.modeling import load_agent
from seed_multimodal.nn.vision.qwen import Resampler, ResamplerConfig

WIDTH = 32
FEATURES = 16
PLACES = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> MultimodalTokenizer:
    return write_seed_x_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def agent_of(tokens: int, seed: int = 0, lora: bool = False, width: int = WIDTH) -> TrainedAgent:
    torch.manual_seed(seed)
    llm: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=160,
        )
    )
    force_special_ids(llm)
    inputs, outputs = (
        ResamplerConfig(2, *sizes) for sizes in ((width, 4, FEATURES), (FEATURES, 4, width))
    )
    agent = TrainedAgent(llm, Resampler(inputs), Resampler(outputs))
    for parameter in agent.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    if lora:
        agent.llm = get_peft_model(
            llm,
            LoraConfig(
                r=2,
                target_modules=["q_proj", "down_proj"],
                task_type="CAUSAL_LM",
                modules_to_save=["norm"],
            ),
        )
    return agent.eval()


@pytest.fixture(scope="module")
def agent(tokenizer: MultimodalTokenizer) -> TrainedAgent:
    return agent_of(len(tokenizer))


def batch_of(tokenizer: MultimodalTokenizer, read: int, n_targets: int) -> dict[str, Any]:
    """One row: input images of two views, text, output images; one more view is unused."""
    vocabulary = tokenizer.vocabulary
    text = tokenizer.encode("It is a cat.")
    ids = [1, *vocabulary.read_ids(2) * read, *text, *vocabulary.run() * n_targets, 2]
    behind = len(ids) - 1 - 6 * n_targets
    code = torch.tensor([[vocabulary.is_code_id(id) for id in ids]])
    reads = torch.arange(len(ids))[None] < behind
    generator = torch.Generator().manual_seed(1)
    views = torch.arange(2 * read + n_targets + 1)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "labels": torch.tensor([ids]).masked_fill(code, -100),
        "ids_cmp_mask": code & reads,
        "ids_gen_mask": code & ~reads,
        "image_embeds": torch.randn(len(views), PLACES, FEATURES, generator=generator),
        "patch_positions": torch.rand(len(views), 2, generator=generator),
        "embeds_cmp_mask": views < 2 * read,
        "embeds_gen_mask": (views >= 2 * read) & (views < 2 * read + n_targets),
    }


# ---- training


@pytest.mark.parametrize(
    ("read", "n_targets", "views"),
    [(1, 1, True), (2, 0, True), (0, 2, True), (0, 0, True), (0, 0, False)],
)
def test_gradients_reach_every_parameter_in_every_batch(
    agent: TrainedAgent, tokenizer: MultimodalTokenizer, read, n_targets, views
):
    batch = batch_of(tokenizer, read, n_targets)
    if not views:
        batch |= dict.fromkeys(
            ("image_embeds", "patch_positions", "embeds_cmp_mask", "embeds_gen_mask")
        )
    agent.zero_grad(set_to_none=True)
    before = torch.get_rng_state()
    losses = agent(**batch)
    losses["total_loss"].backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(losses["total_loss"], losses["lm_loss"] + 6 * losses["rec_loss"])
    assert bool(losses["lm_loss"] > 0) and bool(losses["rec_loss"] > 0) == bool(n_targets)
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is None) == name.endswith(
            "pos_embed"
        ) or name == "patch_pos_embed", name
        used = (
            read
            if name.startswith(("input", "patch"))
            else n_targets
            if name.startswith("output")
            else 1
        )
        if parameter.grad is not None:
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.abs().sum() > 0) == bool(used), name


# ---- weights


def tensors_of(agent: TrainedAgent, llm: bool = True) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in agent.state_dict().items()
        if llm or not name.startswith("llm.")
    }


def holds(agent: TrainedAgent, tensors: Mapping[str, Tensor]) -> bool:
    state = agent.state_dict()
    return all(torch.equal(state[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_load_agent_without_the_language_model(name, tmp_path):
    source = agent_of(40, 0)
    target = agent_of(40, 1)
    tensors = tensors_of(source, llm=False)
    before = tensors_of(target)
    assert len(tensors) == 23
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        assert len(load_agent(target, path).loaded) == 23 and holds(target, tensors)
    assert holds(target, {name: value for name, value in before.items() if name.startswith("llm.")})


def test_load_agent_with_the_language_model_and_names_of_a_wrapper(tmp_path):
    tensors = tensors_of(agent_of(40, 0))
    target = agent_of(40, 1)
    stored = {**tensors, "llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({f"module.{name}": value for name, value in stored.items()}, tmp_path / "a.bin")
    load_agent(target, tmp_path / "a.bin")
    assert holds(target, tensors)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_load_agent_of_a_lora_from_shards(old, frozen, tmp_path):
    """As `zero_to_fp32.py` writes it, with or without the frozen tensors, in the names of old and
    new peft.
    """
    source = agent_of(40, 0, lora=True)
    target = agent_of(40, 1, lora=True)
    tensors = {
        name: value
        for name, value in tensors_of(source).items()
        if frozen
        or not (
            "base_layer" in name
            or "original_module" in name
            or name.endswith("resampler.pos_embed")
        )
    }
    stored = {
        name.replace(".base_layer.", ".") if old else name: value for name, value in tensors.items()
    }
    folder = tmp_path / "pytorch_model.bin"
    names = sorted(stored)
    index = {}
    folder.mkdir()
    for shard in range(2):
        file = f"pytorch_model-0000{shard + 1}-of-00002.bin"
        torch.save({name: stored[name] for name in names[shard::2]}, folder / file)
        index |= dict.fromkeys(names[shard::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(
        str({"weight_map": index}).replace("'", '"')
    )
    load_agent(target, folder)
    assert holds(target, tensors) and (frozen or not holds(target, tensors_of(source)))


def test_load_agent_of_wrong_files(tmp_path):
    agent = agent_of(40, 1)
    tuned = agent_of(40, 1, lora=True)
    complete = tensors_of(agent_of(40, 0))
    tensors = tensors_of(agent_of(40, 0), llm=False)
    lora = tensors_of(agent_of(40, 0, lora=True))
    for model, content, message in (
        (
            agent,
            tensors_of(agent_of(40, 0, width=64), llm=False),
            "tensors have another size, first 'patch_pos",
        ),
        (agent, {**tensors, "unet.x": torch.ones(1)}, "unknown to the model: 'unet.x'"),
        (agent, lora, "missing from the file: 'llm"),
        (tuned, complete, "missing from the file: 'llm"),
    ):
        torch.save(content, tmp_path / "agent.bin")
        before = tensors_of(model)
        with pytest.raises(CheckpointError, match=message):
            load_agent(model, tmp_path / "agent.bin")
        assert holds(model, before)
