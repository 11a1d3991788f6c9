"""The agent on a tiny random LLaMA: gradients, weights (losses: golden kind `seedx_lvlm`)."""

from __future__ import annotations

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
from seed_multimodal.state_dicts import save_state_dict

WIDTH = 32
FEATURES = 16


def agent_of(n_tokens: int = 40, seed: int = 0) -> TrainedAgent:
    from tiny.language import llama

    torch.manual_seed(seed)
    llm = llama(n_tokens)
    inputs = ResamplerConfig(2, WIDTH, 4, FEATURES)
    outputs = ResamplerConfig(2, FEATURES, 4, WIDTH)
    return spread(TrainedAgent(llm, Resampler(inputs), Resampler(outputs)), 0.4).eval()


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


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "model.safetensors", "folder", "whole"])
def test_load_agent_layouts(layout, tmp_path):
    # The original's agents come without the language model, or saved from a DDP wrapper with it
    # and buffers of older transformers.
    tensors = tensors_of(agent_of(), llm=layout == "whole")
    file = tmp_path / (layout if "." in layout else "pytorch_model.bin")
    if layout == "whole":
        rotary = {"llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save({f"module.{name}": value for name, value in (tensors | rotary).items()}, file)
    else:
        (save_state_dict if file.suffix == ".safetensors" else torch.save)(tensors, file)
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
