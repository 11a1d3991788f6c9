"""What a model of images needs of its vision encoder.

Models hold a `VisionEncoder`, whichever network it is, and ask it, not its configuration, for
sizes. Its parameters, device and precision are those of any `nn.Module`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class VisionEncoder(nn.Module, ABC):
    """Normalised pixels → features of an image's tokens.

    A base class and not a `Protocol`, which mypy would accept any `nn.Module` for.
    """

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Pixels a side S of the images that it was trained on."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width W of the features."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Tokens N of an image of `image_size`, the class token included."""

    @property
    @abstractmethod
    def n_class_tokens(self) -> int:
        """Tokens before those of the patches: 0 or 1."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features `[B, N, W]`."""
