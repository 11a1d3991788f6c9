"""The agent on a tiny random LLaMA: gradients, weights (losses: golden kind `seedx_lvlm`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tensors import equal
from tiny import spread
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed_x.losses import TrainedAgent
from seed_multimodal.models.seed_x.modeling import load_agent
from seed_multimodal.nn.vision.qwen import Resampler, ResamplerConfig
from seed_multimodal.weights import save_state_dict

WIDTH = 32
FEATURES = 16


def agent_of(n_tokens: int = 40, seed: int = 0, lora: bool = False) -> TrainedAgent:
    from peft import LoraConfig, get_peft_model
    from tiny.language import llama

    torch.manual_seed(seed)
    llm = llama(n_tokens)
    inputs = ResamplerConfig(2, WIDTH, 4, FEATURES)
    outputs = ResamplerConfig(2, FEATURES, 4, WIDTH)
    agent = spread(TrainedAgent(llm, Resampler(inputs), Resampler(outputs)), 0.4)
    if lora:
        targets = ["q_proj", "down_proj"]
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=["norm"])
        agent.llm = get_peft_model(llm, config)
    return agent.eval()


# ---- training


def batch_of(tokenizer: Any, read: int, n_targets: int) -> dict[str, Any]:
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
        "image_embeds": torch.randn(len(views), 16, FEATURES, generator=generator),
        "patch_positions": torch.rand(len(views), 2, generator=generator),
        "embeds_cmp_mask": views < 2 * read,
        "embeds_gen_mask": (views >= 2 * read) & (views < 2 * read + n_targets),
    }


@pytest.mark.parametrize(
    ("read", "n_targets", "has_views"),
    [(1, 1, True), (2, 0, True), (0, 2, True), (0, 0, True), (0, 0, False)],
)
def test_gradients_reach_every_parameter_in_every_batch(
    seedx_tokenizer, read, n_targets, has_views
):
    # Processes wait for each other's gradients: none may be left out where a batch lacks images.
    agent = agent_of(len(seedx_tokenizer))
    batch = batch_of(seedx_tokenizer, read, n_targets)
    if not has_views:
        for key in ("image_embeds", "patch_positions", "embeds_cmp_mask", "embeds_gen_mask"):
            batch[key] = None
    before = torch.get_rng_state()
    losses = agent(**batch)
    losses["total_loss"].backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(losses["total_loss"], losses["lm_loss"] + 6 * losses["rec_loss"])
    assert losses["lm_loss"] > 0
    assert bool(losses["rec_loss"] > 0) == bool(n_targets)
    uses = {"input_resampler": read, "patch_pos_embed": read, "output_resampler": n_targets}
    for name, parameter in agent.named_parameters():
        if name.endswith(".pos_embed"):  # fixed sines
            assert parameter.grad is None
            continue
        assert parameter.grad.isfinite().all(), name
        is_used = bool(uses.get(name.partition(".")[0], 1))
        assert bool(parameter.grad.abs().sum() > 0) == is_used, name


# ---- weights


def tensors_of(agent: TrainedAgent, llm: bool = True) -> dict[str, Tensor]:
    state = agent.state_dict()
    return {name: state[name].clone() for name in state if llm or not name.startswith("llm.")}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_load_agent_without_the_language_model(name, tmp_path):
    # The original's agents come as files without it.
    tensors = tensors_of(agent_of(), llm=False)
    (save_state_dict if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        target = agent_of(seed=1)
        before = {key: value for key, value in tensors_of(target).items() if key[:4] == "llm."}
        assert set(load_agent(target, path).loaded) == set(tensors)
        assert equal(tensors | before, target.state_dict())


def test_load_agent_with_the_language_model_and_names_of_a_wrapper(tmp_path):
    # Saved from a DDP wrapper, with buffers of older transformers.
    tensors = tensors_of(agent_of())
    stored = {**tensors, "llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({f"module.{name}": value for name, value in stored.items()}, tmp_path / "a.bin")
    target = agent_of(seed=1)
    load_agent(target, tmp_path / "a.bin")
    assert equal(tensors, target.state_dict())


@pytest.mark.parametrize("has_old_names", [False, True])
@pytest.mark.parametrize("has_frozen", [False, True])
def test_load_agent_of_a_lora_from_shards(has_old_names, has_frozen, tmp_path):
    # As `zero_to_fp32.py` writes it, with or without the frozen tensors; peft 0.4 had no
    # `base_layer` in its names.
    frozen = ("base_layer", "original_module", "resampler.pos_embed")
    tensors = {
        name: value
        for name, value in tensors_of(agent_of(lora=True)).items()
        if has_frozen or not any(part in name for part in frozen)
    }
    stored = tensors
    if has_old_names:
        stored = {name.replace(".base_layer.", "."): value for name, value in tensors.items()}
    folder = tmp_path / "pytorch_model.bin"
    folder.mkdir()
    index: dict[str, str] = {}
    for shard in (1, 2):
        file = f"pytorch_model-0000{shard}-of-00002.bin"
        names = sorted(stored)[shard - 1 :: 2]
        torch.save({name: stored[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    target = agent_of(seed=1, lora=True)
    load_agent(target, folder)
    assert equal(tensors, target.state_dict())


@pytest.mark.parametrize(
    ("is_tuned", "content", "named"),
    [
        (False, lambda: {**tensors_of(agent_of(), llm=False), "unet.x": torch.ones(1)}, "unet.x"),
        (False, lambda: tensors_of(agent_of(lora=True)), "llm"),
        (True, lambda: tensors_of(agent_of()), "llm"),
    ],
    ids=["unknown", "a lora without one", "a lora's base"],
)
def test_load_agent_of_other_files_changes_nothing(is_tuned, content, named, tmp_path):
    # A refused file must leave the model as it was.
    model = agent_of(seed=1, lora=is_tuned)
    before: Mapping[str, Tensor] = tensors_of(model)
    torch.save(content(), tmp_path / "agent.bin")
    with pytest.raises(CheckpointError, match=named):
        load_agent(model, tmp_path / "agent.bin")
    assert equal(before, model.state_dict())
