"""Building, running and comparing a recorded stage-1 model, alone or as one of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runner import assert_close, assert_same, read_json, read_tensors
from seed2_common import Tensors, qformer_config, vit_config

from seed_multimodal.seed.configuration import Seed2Config
from seed_multimodal.seed.training import Stage1Model, Stage1Output
from seed_multimodal.weights import assign_strictly


def build(sizes: dict[str, Any], weights: Tensors, gather_gradient: bool | None) -> Stage1Model:
    config = Seed2Config(vit=vit_config(sizes["vit"]), qformer=qformer_config(
        sizes["bert"], sizes["cross_attention_freq"]), num_query=sizes["num_query_token"])
    words = weights["Qformer.bert.embeddings.word_embeddings.weight"].shape[0]
    model = Stage1Model(config, vocab_size=words, embed_dim=sizes["embed_dim"], temperature=sizes["temp"],
                        label_smoothing=sizes["label_smoothing"], gather_gradient=gather_gradient)
    assign_strictly(model, weights, "the fixture")
    return model.train()


def run(model: Stage1Model, given: Tensors) -> Stage1Output:
    model.zero_grad()
    output = model(given["image"], given["input_ids"], given["attention_mask"])
    output.loss.backward()
    return output


def compare(output: Stage1Output, model: Stage1Model, want: Tensors, group: str,
            norms: dict[str, float | None]) -> None:
    pairs = {"loss": output.loss, "loss_itc": output.loss_itc, "sim_i2t": output.sim_i2t, "sim_t2i": output.sim_t2i,
             "query_feats_normalized": output.query_feats, "text_feat": output.text_feats}
    for name, value in pairs.items():
        assert_close(value.detach(), want[f"{group}.{name}"], 1e-5, 1e-4, f"{group}.{name}")
    assert_same(output.targets.tolist(), want[f"{group}.targets"].tolist(), f"{group}.targets")
    parameters = dict(model.named_parameters())
    for name in (n for n in want if n.startswith(f"{group}.grad.")):
        gradient = parameters[name.removeprefix(f"{group}.grad.")].grad
        assert_close(gradient, want[name], 1e-6, 1e-3, name)
    for name, norm in norms.items():
        gradient = parameters[name].grad
        if norm is None:
            assert gradient is None, f"{group}: {name} has a gradient"
        else:
            assert_close(gradient.norm(), norm, 1e-5, 1e-3, f"{group}: gradient norm of {name}")


def worker(rank: int, world: int, folder: str, rendezvous: str) -> None:
    """One of `world` processes on its share of the batch; lives here so that a spawned process can import it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        root = Path(folder)
        weights, given, want = (read_tensors(root / f"{p}.safetensors") for p in ("weights", "inputs", "outputs"))
        model = build(read_json(root / "config.json"), weights, None)
        local = {name: value.chunk(world)[rank] for name, value in given.items()}
        norms = read_json(root / "meta.json")[f"grad_norms_world{world}_rank{rank}"]
        compare(run(model, local), model, want, f"world{world}.rank{rank}", norms)
    finally:
        dist.destroy_process_group()
