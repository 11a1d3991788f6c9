"""LaVIT's visual tokenizer in unified pre-training: its settings, what its frozen parts see in pictures, and the parts
that are trained from there. Source: specification §5.3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import first_file
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.lavit.modeling import MODES, DynamicTokenizer, TokenMerger, kept_rows
from seed_multimodal.nn.layers import cast_layers
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.llm.config import find_folder
from seed_multimodal.weights import assign_strictly, load_state_dict

VISUAL = ("visual_weight.safetensors", "visual_weight.bin")
PARTS = ("causal_encoder", "vit_proj")  # what is trained beside the language model, by the released names


@dataclass
class VisualModel:
    """The frozen tokenizer of stage 1, and where the trained merger and projector start.

    Attributes:
        path: the tokenizer's folder, a released model's or ours (`lavit.checkpoints`).
        start: a `visual_weight` file, or a folder with one; None: stage 1's merger, and a new projector.
        selection: `draw` (as released: each patch by its probability, a function of seed and sample here) or
            `threshold`.
        at_once: pictures that the frozen networks take at a time.
        seed: of a new projector.
    """

    path: str
    start: str | None = None
    selection: str = setting("draw", choices=MODES)
    at_once: int = setting(16, least=1)
    seed: int = setting(0, least=0)


def read_visual(config: Mapping[str, Any], where: str = "visual_encoder") -> VisualModel:
    """Settings of a mapping.

    Raises:
        ConfigError: an unknown key or value; no path.
    """
    if not config.get("path"):
        raise ConfigError(f"{where}: path is needed: the folder of LaVIT's visual tokenizer.")
    return read_settings(VisualModel, config, where)


class PatchFeatures(FrozenFeatures):
    """Pictures → the frozen tower's features `[N, patches, D]`, fp32."""

    def __init__(self, tokenizer: DynamicTokenizer, device: torch.device, at_once: int) -> None:
        self.tokenizer = tokenizer
        super().__init__(tokenizer.encoder, device, at_once)

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.tokenizer.patch_features(normalise(pixels))


class VisualTokens:
    """The frozen tokenizer of stage 1 in stage 2: features, selection, codes; and what starts the trained parts.

    Attributes:
        tokenizer: frozen; its merger makes codes and stays as it was.
        features: pictures → features, after `to`.
    """

    def __init__(self, settings: VisualModel, dtype: torch.dtype) -> None:
        """Load it, on the CPU. Raises CheckpointError as `load_dynamic_tokenizer`. `dtype`: of its layers."""
        self.settings = settings
        self.tokenizer = load_dynamic_tokenizer(find_folder(settings.path))
        self.config = self.tokenizer.config
        self._start = {name: value.clone() for name, value in self.tokenizer.causal_encoder.state_dict().items()}
        self.tokenizer.vit_proj = None
        cast_layers(self.tokenizer, dtype)

    def to(self, device: torch.device) -> VisualTokens:
        """Move it to the training device."""
        self.tokenizer.to(device)
        self.features = PatchFeatures(self.tokenizer, device, self.settings.at_once)
        return self

    @torch.no_grad()
    def choose(self, features: Tensor, seeds: Sequence[int]) -> Tensor:
        """Features `[n, N, D]` → kept (1) or dropped (0) `[n, N]`; the draw of each picture is that of its seed."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        return self.tokenizer.select(features, mode=self.settings.selection, generator=generators).keep_BN

    @torch.no_grad()
    def codes(self, features: Tensor, keep: Tensor) -> list[list[int]]:
        """Features `[n, N, D]` and what is kept of them `[n, N]` → the codes of each picture."""
        found: list[list[int]] = []
        for some, kept in zip(features.split(self.settings.at_once), keep.split(self.settings.at_once), strict=True):
            rows, counts = kept_rows(self.tokenizer.merge(some, kept), kept)
            found += [one.tolist() for one in self.tokenizer.quantize_rows(rows)[0].split(counts.tolist())]
        return found

    def trained_parts(self, width: int) -> tuple[TokenMerger, nn.Linear]:
        """What is trained, in fp32: the merger, and the projector to a language model of this width.

        Raises:
            CheckpointError: as `load_visual`.
        """
        sizes = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            merger = TokenMerger(sizes)
            projector = nn.Linear(sizes.vit.width, width)
        if self.settings.start is None:
            merger.load_state_dict(self._start)
        else:
            load_visual({"causal_encoder": merger, "vit_proj": projector}, find_folder(self.settings.start))
        self._start = {}
        return merger, projector


def find_visual(place: Path) -> Path:
    """The `visual_weight` file of a folder, or the file itself.

    Raises:
        CheckpointError: there is none.
    """
    found = first_file(place, VISUAL) if place.is_dir() else place
    if found is None or not found.is_file():
        raise CheckpointError(f"{place}: there is no {VISUAL[0]}, the merger and projector of a language model.")
    return found


def load_visual(parts: Mapping[str, nn.Module], place: Path) -> None:
    """Fill merger and projector from a file, or a folder with one.

    Raises:
        CheckpointError: there is none, or one of its tensors is missing or of another size.
    """
    file = find_visual(place)
    state = load_state_dict(file)
    for name, part in parts.items():
        start = f"{name}."
        if not any(key.startswith(start) for key in state):
            raise CheckpointError(f"{file}: holds no {name}, so it is no {VISUAL[0]} of a LaVIT.")
        assign_strictly(part, {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)},
                        file)
