"""SEED-X's vision tower: every recorded activation from pixels to features, and resamplers, sines and resized positions
alone."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from torch import Tensor, nn

from seed_multimodal.nn.layers import resize_square
from seed_multimodal.seed_x.vision import QwenVit, QwenVitConfig, Resampler, ResamplerConfig, sine_table
from seed_multimodal.weights import assign_strictly

KIND = "seedx_visual"
Tensors = dict[str, Tensor]


def part(tensors: Tensors, label: str) -> Tensors:
    """What begins with `label.`, without it."""
    return {name.removeprefix(f"{label}."): value for name, value in tensors.items() if name.startswith(f"{label}.")}


def _recorded(model: QwenVit) -> Tensors:
    """Filled by hooks with the activations that the fixture names."""
    seen: Tensors = {}

    def keep(module: nn.Module, name: str, before: str = "") -> None:
        def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen[name] = made
            if before:
                seen[before] = given[0]
        module.register_forward_hook(hook)

    keep(model.ln_pre, "ln_pre", "before_ln_pre")
    keep(model.transformer, "transformer")
    keep(model.attn_pool, "attn_pool")
    keep(model.ln_post, "ln_post", "before_ln_post")
    return seen


def check_tower(sizes: dict, given: Tensors, weights: Tensors, want: Tensors) -> None:
    label = sizes.pop("label")
    model = QwenVit(QwenVitConfig(**sizes)).eval()
    assign_strictly(model, part(weights, label), label)
    seen = _recorded(model)
    seen["output"] = model(given["image"], given.get("patch_positions"))
    seen["transformer_lnd"] = seen["transformer"].transpose(0, 1)
    assert want, f"{label}: nothing recorded"
    for name, value in want.items():
        assert name in seen, f"{label}.{name}: not an activation that is known here"
        assert_close(seen[name], value, 1e-5, 1e-4, f"{label}.{name}")


def check_resampler(label: str, heads: int, x: Tensor, weights: Tensors, want: Tensor) -> None:
    queries, width = weights["query"].shape
    resampler = Resampler(ResamplerConfig(grid_size=math.isqrt(queries), embed_dim=width, num_heads=heads,
                                          kv_dim=x.shape[-1])).eval()
    assert_close(resampler.pos_embed, weights["pos_embed"], 1e-6, what=f"{label}: sines")
    assign_strictly(resampler, weights, label)
    assert_close(resampler(x), want, 1e-5, 1e-4, f"{label}.output")


@torch.no_grad()
def check(folder: Path) -> None:
    sizes = read_json(folder / "config.json")
    weights, given, want = (read_tensors(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    known = set()
    for model in sizes["models"]:
        known.add(model["label"])
        check_tower(dict(model), part(given, model["label"]), weights, part(want, model["label"]))
    for label, one in sizes["resamplers"].items():
        known.add(label)
        assert_same(list(part(weights, label)["query"].shape), one["shape_of_query"], f"{label}: queries")
        check_resampler(label, one["num_heads"], given[f"{label}.x"], part(weights, label), want[f"{label}.output"])
    for name, value in want.items():
        label, _, rest = name.partition(".")
        if label == "abs_pos":
            side = math.isqrt(int(rest.removeprefix("to_")))
            assert_close(resize_square(given["abs_pos.src"], side), value, 1e-6, 1e-5, name)
        elif label == "sincos":
            width, grid = map(int, rest.split("x"))
            assert_close(sine_table(width, grid), value, 1e-6, what=name)
        else:
            assert label in known, f"{name}: not a part that is known here"
