"""What the SEED-2 kinds share: sizes from a fixture's config, and recorded AdamW steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seed_multimodal.nn.eva import EvaConfig
from seed_multimodal.seed.configuration import QFormerConfig, Seed2Config

Tensors = dict[str, torch.Tensor]


def vit_config(sizes: dict[str, Any]) -> EvaConfig:
    width = sizes["embed_dim"]
    return EvaConfig(image_size=sizes["img_size"], patch_size=sizes["patch_size"], width=width, depth=sizes["depth"],
                     heads=sizes["num_heads"], mlp_width=int(width * sizes["mlp_ratio"]))


def qformer_config(bert: dict[str, Any], cross_attention_freq: int = 2) -> QFormerConfig:
    return QFormerConfig(
        width=bert["hidden_size"], depth=bert["num_hidden_layers"], heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"], max_positions=bert["max_position_embeddings"],
        cross_attention_freq=bert.get("cross_attention_freq", cross_attention_freq),
        dropout=bert.get("hidden_dropout_prob", 0.1))


def tokenizer_config(sizes: dict[str, Any], reverse_depth: int) -> Seed2Config:
    return Seed2Config(
        vit=vit_config(sizes["vit"]), qformer=qformer_config(sizes["bert"]), num_query=sizes["num_query_token"],
        codebook_size=sizes["codebook_size"], codebook_dim=sizes["codebook_dim"], decode_depth=sizes["decode_depth"],
        decode_heads=sizes["decode_blocks_heads"], image_features_dim=sizes["image_features_dim"],
        use_qformer_image=sizes["use_qformer_image"], reverse_depth=reverse_depth)


def recorded_adamw(model: nn.Module, recorded: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with the recorded groups; settings stand in the record itself or in its `defaults`."""
    settings, parameters = {**recorded, **recorded.get("defaults", {})}, dict(model.named_parameters())
    groups = [{"params": [parameters[name] for name in group["params"]], "weight_decay": group["weight_decay"]}
              for group in recorded["groups"]]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"])


def recorded_steps(want: Tensors, start: Tensors) -> list[int]:
    """Steps whose parameters can be compared: 1, 2, both or none.

    Some recordings kept references to the parameters. Then `step1.*` shows the state after the second step too, and
    only `step2` counts (it cannot be right with a wrong first step); or both show the start, where the recorder went
    back to it, and only the recorded losses before and after each step say whether the steps were right.
    """
    groups = {number: {name.removeprefix(f"step{number}."): value for name, value in want.items()
                       if name.startswith(f"step{number}.")} for number in (1, 2)}
    shared = [name for name in groups[1] if name in groups[2]]
    if shared and all(torch.equal(groups[1][name], groups[2][name]) for name in shared):
        del groups[1]
    return [number for number, group in groups.items()
            if any(not torch.equal(value, start[name][: len(value)] if value.ndim else start[name])
                   for name, value in group.items() if name in start)]


class ClearGradients:
    """Entries whose gradient was large enough at every step: AdamW blows tiny ones up to a full step."""

    def __init__(self) -> None:
        self.masks: Tensors = {}

    def note(self, model: nn.Module, zero_counts: bool = False) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                clear = parameter.grad.abs() > 1e-6
                if zero_counts:
                    clear |= parameter.grad == 0
                self.masks[name] = self.masks[name] & clear if name in self.masks else clear
