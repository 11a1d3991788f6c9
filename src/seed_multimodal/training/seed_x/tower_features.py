"""Features of views by the frozen vision tower, computed on the training device, and kept on disk if asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.disk import writing
from seed_multimodal.images.transforms import normalise
from seed_multimodal.training.checkpoint import frozen_check_sum
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.seed_x.tuning_settings import TowerModel
from seed_multimodal.vision.qwen_vit import QwenVit
from seed_multimodal.weights import load_state_dict, save_state_dict

_NAME = "features"


class TowerFeatures:
    """Views → features, without gradients.

    Args:
        tower: frozen. cache: folder of kept features; those of one tower and precision lie together.
    """

    def __init__(self, tower: nn.Module, device: torch.device, at_once: int = 16, cache: str | Path | None = None
                 ) -> None:
        self.tower, self.device, self.at_once = tower.requires_grad_(False).eval().to(device), device, at_once
        self.dtype = next(tower.parameters()).dtype
        self.cache: Path | None = None
        if cache is not None:
            self.cache = Path(cache) / f"{frozen_check_sum(tower):08x}-{str(self.dtype).removeprefix('torch.')}"

    @classmethod
    def open(cls, settings: TowerModel, device: torch.device, dtype: torch.dtype,
             log: Callable[[str], None] | None = None) -> TowerFeatures:
        """Load the tower.

        Raises:
            CheckpointError: as `QwenVit.from_pretrained`.
        """
        tower = QwenVit.from_pretrained(find_folder(settings.path), config=settings.sizes, device=device, dtype=dtype,
                                        log=log)
        return cls(tower, device, settings.at_once, settings.cache)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Views uint8 [N, 3, S, S], on the CPU → features [N, places, K] on the device.

        Raises:
            CheckpointError: kept features that are damaged, or cannot be written.
        """
        files = [self._file(view) for view in pixels] if self.cache is not None else []
        kept = {number: load_state_dict(file)[_NAME] for number, file in enumerate(files) if file.is_file()}
        missing = [number for number in range(len(pixels)) if number not in kept]
        made: list[Tensor] = []
        for start in range(0, len(missing), self.at_once):
            chosen = pixels[missing[start:start + self.at_once]]
            made += self.tower(normalise(copy_to(self.device, chosen)).to(self.dtype)).to(self.dtype)
        for number, one in zip(missing if files else [], made, strict=False):
            with writing(files[number]):
                save_state_dict({_NAME: one}, files[number])
        fresh = dict(zip(missing, made, strict=True))
        return torch.stack([fresh[number] if number in fresh else copy_to(self.device, kept[number])
                            for number in range(len(pixels))])

    def _file(self, view: Tensor) -> Path:
        assert self.cache is not None
        digest = hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()
        return self.cache / digest[:2] / f"{digest}.safetensors"
