"""A frozen vision tower on packed weights, for training on top of it: the plain tower's values, computed faster.

    tower = FastTower(model.visual_encoder, torch.float16, compile=True)
    features = tower(images)                            # as model.visual_encoder(images), without gradients

Peculiar: packed copies cost the tower's memory once more. They are made at the first call and again after the tower's
weights have changed (a checkpoint was loaded).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from seed_multimodal.tokenizers.fast import RECOMPILES, compiler
from seed_multimodal.tokenizers.fast_encoder import FastVision
from seed_multimodal.vision.eva import EvaVit


class FastTower:
    """Pixels → tower output.

    Args:
        tower: stays as it is.
        dtype: of the matrix products; the residual stream is float32, as under autocast.
        compile: compile each function once per batch size (seconds, at first use).
    """

    def __init__(self, tower: EvaVit, dtype: torch.dtype, *, compile: bool = False) -> None:
        self.tower, self.dtype, self.is_compiled = tower, dtype, compile
        self._packed: FastVision | None = None
        self._packed_from: list[tuple[int, int]] = []

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tower output before `ln_vision` `[B, N, W]` float32, without gradients.

        Raises:
            ImageError: another image size than the tower's.
        """
        self.tower.check_images(images)
        # Packing and computing both in their own precision, whatever the caller's autocast.
        with torch.autocast(images.device.type, enabled=False), contextlib.ExitStack() as stack:
            if self.is_compiled:
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILES))
            return self._vision()(images.to(self.dtype))

    def _vision(self) -> FastVision:
        present = [(parameter.data_ptr(), parameter._version) for parameter in self.tower.parameters()]
        if self._packed is None or present != self._packed_from:
            self._packed = FastVision(self.tower, dtype=self.dtype, residual_dtype=torch.float32, head_width=None,
                                      gelu="erf", wrap=compiler("default" if self.is_compiled else None))
            self._packed_from = present
        return self._packed
