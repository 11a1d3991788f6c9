"""Stable Diffusion's safety checker: which pictures it would not show.

Self-contained: it computes in float32, whatever autocast it is called under and whatever precision draws (LaVIT's
released one needed the caller's autocast).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from seed_multimodal.detokenizers.pipelines import PipelineDetokenizer
from seed_multimodal.errors import SeedWarning
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.weights import refuse_tensors

CHECKER_PARTS = ("safety_checker", "feature_extractor")
RELEASED = "pixel_decoding"  # folder of LaVIT's


class SafetyChecker:
    """Pictures → whether each is one of those it was made to recognise."""

    def __init__(self, model: Any, extractor: Any) -> None:
        self.model, self.extractor = model, extractor

    @classmethod
    def find(cls, folder: str | Path, kind: type[PipelineDetokenizer]) -> Self | None:
        """The checker of a diffusion folder, or of `pixel_decoding` beside it; None, with a warning, if there is none.
        """
        for place in (Path(folder), Path(folder).parent / RELEASED):
            if all((place / part).is_dir() for part in CHECKER_PARTS):
                return cls.from_pretrained(place, kind)
        warnings.warn(f"{folder}: holds no safety checker ({' and '.join(CHECKER_PARTS)}), so pictures are drawn "
                      f"without one.", SeedWarning, stacklevel=3)
        return None

    @classmethod
    def from_pretrained(cls, folder: Path, kind: type[PipelineDetokenizer]) -> Self:
        """The checker of a diffusion folder; `kind`: the de-tokenizer it is for, named in messages.

        Raises:
            CheckpointError: not complete, or damaged.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        whole: Any = StableDiffusionSafetyChecker
        with kind.reading(folder):
            model, info = whole.from_pretrained(folder / CHECKER_PARTS[0], dtype=torch.float32, local_files_only=True,
                                                output_loading_info=True)
            extractor = CLIPImageProcessor.from_pretrained(folder / CHECKER_PARTS[1], local_files_only=True)
        refuse_tensors(sorted(info["missing_keys"]), (), folder / CHECKER_PARTS[0], "missing from the file")
        return cls(model.eval(), extractor)

    def to(self, device: str | torch.device) -> Self:
        """Move it; returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[bool]:
        """Whether each of the pictures must not be shown."""
        device = self.model.device
        pixels = self.extractor(pictures, return_tensors="pt").pixel_values.to(device, torch.float32)
        with torch.autocast(device.type, enabled=False), quiet_loading("diffusers"):
            flags = self.model(clip_input=pixels, images=torch.zeros(len(pictures), 1))[1]
        return [bool(flag) for flag in flags]
