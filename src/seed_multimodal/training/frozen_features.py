"""Features of pixels by frozen models, computed on the training device, and kept on disk if asked for."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.disk import writing
from seed_multimodal.errors import CheckpointError
from seed_multimodal.likeness import some_weights
from seed_multimodal.training.checkpoint import frozen_check_sum
from seed_multimodal.weights import load_state_dict, save_state_dict

_NAME = "features"


class FrozenFeatures:
    """Pixels → features, without gradients; a subclass has `compute`.

    Args:
        model: frozen. at_once: pictures of a pass. cache: folder of kept features; those of one model (weights and
            settings), precision and `variant` lie together, each by the hash of its pixels.

    Attributes:
        model: None after `release`, when only kept features are read.
        folder: of kept features.
        some_weights: of the model, after `release`, too.
    """

    def __init__(self, model: nn.Module, device: torch.device, at_once: int = 16, cache: str | Path | None = None,
                 variant: str = "") -> None:
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.device, self.at_once, self.dtype = device, at_once, next(model.parameters()).dtype
        self.some_weights = some_weights(model)
        self.folder: Path | None = None
        if cache is not None:
            name = f"{_fingerprint(model):08x}-{str(self.dtype).removeprefix('torch.')}{variant}"
            self.folder = Path(cache) / name

    @property
    def held(self) -> int:
        """Bytes of the model."""
        return 0 if self.model is None else sum(tensor.nbytes for tensor in self.model.parameters())

    def compute(self, pixels: Tensor) -> Tensor:
        """uint8 `[B, 3, S, S]` on the device → features `[B, ...]`."""
        raise NotImplementedError

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `[N, 3, S, S]`, on the CPU → features `[N, ...]` on the device.

        Raises:
            CheckpointError: kept features that are damaged, are gone after `release`, or cannot be written.
        """
        fresh = self.keep(pixels)
        return torch.stack([fresh[number] if number in fresh else copy_to(
            self.device, _kept(self._file(view))) for number, view in enumerate(pixels)])

    @torch.no_grad()
    def keep(self, pixels: Tensor) -> dict[int, Tensor]:
        """Compute, and with a folder write, what is not kept yet; returns that by its place. Raises as a call."""
        files = [self._file(view) for view in pixels] if self.folder is not None else []
        missing = [number for number in range(len(pixels)) if not files or not files[number].is_file()]
        if missing and self.model is None:
            raise CheckpointError(f"{files[missing[0]]}: the features of a picture are no longer kept there; pictures "
                                  "or folder have changed since they were made. The same command makes them anew.")
        made: list[Tensor] = []
        for start in range(0, len(missing), self.at_once):
            made += self.compute(copy_to(self.device, pixels[missing[start:start + self.at_once]]))
        for number, one in zip(missing if files else [], made, strict=False):
            with writing(files[number]):
                save_state_dict({_NAME: one}, files[number])
        return dict(zip(missing, made, strict=True))

    def release(self) -> None:
        """Let go of the model; what is asked for from here on must be kept."""
        self.model = None

    def _file(self, view: Tensor) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"


def _kept(file: Path) -> Tensor:
    try:
        found = load_state_dict(file)
        if _NAME not in found:
            raise CheckpointError(f"{file}: holds no {_NAME}")
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; delete it, and the same command makes the features anew."
                              ) from error
    return found[_NAME]


def _fingerprint(model: nn.Module) -> int:
    """CRC of weights and settings: the same weights in other heads are another model."""
    config: Any = model.config
    known = vars(config) if is_dataclass(config) else {key: config[key] for key in config if not key.startswith("_")}
    return zlib.crc32(json.dumps(known, sort_keys=True, default=str).encode(), frozen_check_sum(model))
