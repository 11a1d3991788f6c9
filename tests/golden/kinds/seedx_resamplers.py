"""The perceivers between SEED-X's features and SDXL: the released one (`xlv2`), the older ones, and the attention pool.

Not covered: `attnpool.all_tokens` but its first row (the pool computes that row alone).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runner import assert_close, read_json, read_tensors
from torch import Tensor, nn

from seed_multimodal.nn.layers import AttentionPool
from seed_multimodal.seed_x.adapter import ResamplerSizes, ResamplerXLV2
from seed_multimodal.weights import assign_strictly

KIND = "seedx_resamplers"
Tensors = dict[str, Tensor]
CLASSES = ("xlv2", "xlv2_normalize", "xl", "plain")


class Plain(nn.Module):
    """The unused `Resampler` of the released code, out of the released perceiver's parts: one projection, then the
    norm."""

    def __init__(self, sizes: dict[str, Any], output: int) -> None:
        super().__init__()
        whole = ResamplerXLV2(ResamplerSizes(**sizes))
        self.latents, self.proj_in, self.layers = whole.latents, whole.proj_in, whole.layers
        self.proj_out, self.norm_out = nn.Linear(sizes["dim"], output), nn.LayerNorm(output)

    def forward(self, x: Tensor) -> Tensor:
        queries, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for attention, feed_forward in self.layers:
            queries = queries + attention(x, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


def check_one(label: str, sizes: dict[str, Any], weights: Tensors, x: Tensor, want: Tensors) -> None:
    kind = sizes.pop("class")
    assert kind in CLASSES, f"{label}: no perceiver {kind!r} is known here"
    model = Plain(sizes, sizes.pop("output_dim")) if kind == "plain" else ResamplerXLV2(ResamplerSizes(**sizes))
    assign_strictly(model.eval(), weights, label)
    made = model(x)
    made = {"output": made} if kind == "plain" else dict(zip(("prompt_embeds", "pooled"), made, strict=True))
    assert made.keys() == want.keys(), f"{label}: recorded are {', '.join(want)}"
    for name, value in want.items():
        assert_close(made[name], value, 1e-5, 1e-4, f"{label}.{name}")


def check_pool(sizes: dict[str, Any], weights: Tensors, x: Tensor, want: Tensors) -> None:
    pool = AttentionPool(sizes["seq_len"], sizes["embed_dim"], sizes["num_heads"], sizes["output_dim"]).eval()
    assign_strictly(pool, weights, "attnpool")
    assert_close(pool(x), want["output"], 1e-5, 1e-4, "attnpool.output")
    assert_close(pool(x), want["all_tokens"][0], 1e-5, 1e-4, "attnpool.all_tokens")


@torch.no_grad()
def check(folder: Path) -> None:
    tensors = {name: read_tensors(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")}
    for label, sizes in read_json(folder / "config.json").items():
        weights, given, want = ({name.removeprefix(f"{label}."): value for name, value in part.items()
                                 if name.startswith(f"{label}.")} for part in tensors.values())
        if label == "attnpool":
            check_pool(sizes, weights, given["x"], want)
        else:
            check_one(label, dict(sizes), weights, given["x"], want)
