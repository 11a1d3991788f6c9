"""An adapter's changes to each tensor of the base: W + scale · B · A, or another tensor in its place.

Read are `adapter_model.safetensors` and the old `adapter_model.bin` with their `adapter_config.json`, and what
DeepSpeed's `zero_to_fp32.py` writes of a training run (names with the engine's, the loss module's and peft's prefixes).
An agent of SEED-X (its tuning's checkpoint, or an export of it) holds its resamplers' tensors, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.shards import Shards

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
AGENT_CONFIG = "agent.json"  # beside the tensors of a tuned SEED-X: sizes of the resamplers, LoRA
AGENT = ("input_resampler.", "output_resampler.", "patch_pos_embed")
PREFIX = "base_model.model."
_OUTER = ("module.", "_orig_mod.", "llm.")
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LowRankPair:
    """Names of a low-rank pair."""

    a: str
    b: str


class TrainedTensors:
    """The trained tensors of a run by the base's names.

    Attributes:
        low: base name → its low-rank pair.
        whole: base name → the tensor that takes its place.
        beside: of an agent, its own tensors: released name → name in the file.
        agent: `agent.json`; empty without one.
        scale: of the products B · A.
        config: `adapter_config.json`, or the fields given.
    """

    def __init__(self, source: str | Path, lora: Mapping[str, Any] | None = None) -> None:
        place = Path(source)
        self.source = place
        file = next((place / name for name in ADAPTER_FILES if (place / name).is_file()), place)
        self.shards = Shards(file)
        self.low: dict[str, LowRankPair] = {}
        self.whole: dict[str, str] = {}
        self.beside: dict[str, str] = {}
        pairs: dict[str, dict[str, str]] = {}
        for name in self.shards.entries:
            self._sort(name, pairs)
        self._pair(pairs)
        home = place if place.is_dir() else place.parent
        there = [folder / AGENT_CONFIG for folder in (home, home.parent) if (folder / AGENT_CONFIG).is_file()]
        self.agent = read_json_object(there[0]) if there and self.beside else {}
        self.config = self._read_config(home, self.agent.get("lora") or lora)
        self.scale = self._scale() if self.low else 1.0

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its name in the file."""
        return self.shards.entries[name].shape

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        return self.shards.read(name)

    def state(self) -> dict[str, Tensor]:
        """Everything, by peft's names (for a `PeftModel`)."""
        found = {f"{PREFIX}{base}": self.read(name) for base, name in self.whole.items()}
        for base, pair in self.low.items():
            stem = PREFIX + base.removesuffix(".weight")
            found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"] = self.read(pair.a), self.read(pair.b)
            for kind in ("weight", "bias"):  # the base's own, which an export of everything has, too
                if f"{stem}.{kind}" in found:
                    found[f"{stem}.base_layer.{kind}"] = found.pop(f"{stem}.{kind}")
        return found

    def _sort(self, name: str, pairs: dict[str, dict[str, str]]) -> None:
        plain = name
        while any(plain.startswith(outer) for outer in _OUTER):
            plain = plain[next(len(outer) for outer in _OUTER if plain.startswith(outer)):]
        if plain.startswith(AGENT):
            self.beside[plain] = name
            return
        plain = plain.removeprefix(PREFIX)
        # A bias of a layer with LoRA, trained by the adapter's `bias` setting; merged, it is the plain layer's.
        plain = plain.replace(".base_layer.bias", ".bias")
        if ".original_module." in plain or ".base_layer." in plain or "rotary_emb.inv_freq" in plain:
            return  # the base's own, kept beside the adapter
        plain = plain.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")
        for part in ("lora_A", "lora_B"):
            if plain.endswith(f".{part}.weight"):
                pairs.setdefault(plain.removesuffix(f".{part}.weight") + ".weight", {})[part] = name
                return
        if "lora_" in plain:
            raise CheckpointError(f"{self.shards.source}: {name!r} is no part of plain LoRA and cannot be merged.")
        self.whole[plain] = name

    def _pair(self, pairs: dict[str, dict[str, str]]) -> None:
        for base, parts in pairs.items():
            if len(parts) < 2:
                there, gone = next(iter(parts)), "lora_B" if "lora_A" in parts else "lora_A"
                raise CheckpointError(f"{self.shards.source}: {base!r} has {there} but no {gone}.")
            pair = LowRankPair(parts["lora_A"], parts["lora_B"])
            a, b = self.shape(pair.a), self.shape(pair.b)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise CheckpointError(f"{self.shards.source}: lora_A {a} and lora_B {b} of {base!r} do not multiply.")
            self.low[base] = pair

    def _read_config(self, folder: Path, lora: Mapping[str, Any] | None) -> dict[str, Any]:
        file = folder / ADAPTER_CONFIG
        if not file.is_file():
            return dict(lora or {})
        return read_json_object(file)

    def _scale(self) -> float:
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
            raise CheckpointError(f"{self.source}: holds LoRA matrices, but nothing says their r and lora_alpha "
                                  f"({ADAPTER_CONFIG}, or peft_config of the model's configuration).")
        for key in _UNSUPPORTED:
            if self.config.get(key):
                raise CheckpointError(f"{self.source}: an adapter with {key} cannot be merged here.")
        if str(self.config.get("init_lora_weights")).startswith(_CHANGE_BASE):
            raise CheckpointError(f"{self.source}: an adapter that began with init_lora_weights "
                                  f"{self.config['init_lora_weights']!r} belongs to a base that was changed for it, "
                                  "and cannot be merged here.")
        for name, pair in self.low.items():
            if self.shape(pair.a)[0] != rank:
                raise CheckpointError(f"{self.source}: lora_A of {name!r} has {self.shape(pair.a)[0]} rows, but r is "
                                      f"{rank}.")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@torch.no_grad()
def merge_into(llama: Any, source: str | Path, lora: Mapping[str, Any] | None = None) -> None:
    """Change a LLaMA's weights as a trained file or folder says; tensors of other models in it are left alone.

    Args:
        lora: r and lora_alpha where there is no `adapter_config.json`.

    Raises:
        CheckpointError: tensors for layers that the model does not have, or of another size.
    """
    trained = TrainedTensors(source, lora)
    own = dict(llama.named_parameters())
    for name in (*trained.low, *(name for name in trained.whole if name.startswith(("model.", "lm_head.")))):
        if name not in own:
            raise CheckpointError(f"{source}: holds a change of {name!r}, which the language model does not have.")
        value = trained.read(trained.whole[name]) if name in trained.whole else own[name]
        if name in trained.low:
            a, b = (trained.read(part).to(own[name].device, torch.float32)
                    for part in (trained.low[name].a, trained.low[name].b))
            if (b.shape[0], a.shape[1]) != tuple(own[name].shape):
                raise CheckpointError(f"{source}: {name!r} is {tuple(own[name].shape)} in the language model, but "
                                      f"lora_B · lora_A is {(b.shape[0], a.shape[1])}.")
            value = value.to(own[name].device, torch.float32) + trained.scale * (b @ a)
        if value.shape != own[name].shape:
            raise CheckpointError(f"{source}: {name!r} is {tuple(value.shape)}, but the language model has "
                                  f"{tuple(own[name].shape)}.")
        own[name].data = value.to(own[name])  # not in place: it may be a view of the base's file
    trained.shards.close()
