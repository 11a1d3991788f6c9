"""What a model of images needs of its vision encoder.

Models hold a `VisionEncoder`, whichever network it is, and ask it, not its configuration, for sizes
and for the preprocessing of its images. Its parameters, device and precision are those of any
`nn.Module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform

State = dict[str, Tensor]


class VisionConfig:
    """Base of the dataclasses that describe a vision encoder; see `registry`."""

    unused: tuple[str, ...] = ()  # shell patterns of tensors in weight files that it does not read
    default_weights: str | None = None  # where `read_weights` finds them without another source

    @property
    def preprocessing(self) -> ImageTransform:
        """How images become the encoder's pixels."""
        raise NotImplementedError

    def with_pooled_feature(self) -> Self:
        """An encoder that can compute `features_and_pooled`.

        Raises ConfigError: it has no feature of the image.
        """
        raise ConfigError(f"{type(self).__name__}: the vision encoder has no pooled feature.")

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled feature, of a `with_pooled_feature`."""
        raise NotImplementedError

    def build(self) -> VisionEncoder:
        """An encoder with random weights."""
        raise NotImplementedError

    def read_weights(self, source: str) -> State:
        """Its tensors from a file, folder or hub id. Raises CheckpointError."""
        raise NotImplementedError

    def fit_weights(self, state: Mapping[str, Tensor], prefix: str = "") -> State:
        """Tensors of a checkpoint with the shapes of this configuration.

        prefix: before the encoder's names.
        """
        return dict(state)


class VisionEncoder(nn.Module):
    """Normalised pixels → features of an image's tokens; subclasses set the sizes and `forward`.

    A base class and not a `Protocol`, which mypy would accept any `nn.Module` for.

    width: W of the features.
    n_tokens: N of an image of `image_size`, those before the patches' included.
    n_class_tokens: those before the patches': 0, a class token, or also registers.
    """

    config: VisionConfig
    width: int
    n_tokens: int
    n_class_tokens: int

    @property
    def preprocessing(self) -> ImageTransform:
        """How images become its pixels: size, resizing, mean and deviation."""
        return self.config.preprocessing

    @property
    def image_size(self) -> int:
        """Pixels a side S of the images that it was trained on."""
        return self.preprocessing.image_size

    @property
    def n_patches(self) -> int:
        """Tokens of patches, the last ones, in raster order: a square."""
        return self.n_tokens - self.n_class_tokens

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features `[B, N, W]`."""
        raise NotImplementedError

    def features_and_pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the encoder's own feature of each image `[B, P]`, by one pass.

        Of an encoder that was built by a configuration `with_pooled_feature`.
        """
        raise NotImplementedError

    def patch_features(self, images: Tensor) -> Tensor:
        """As `forward`, without the class tokens: `[B, n_patches, W]`."""
        return self(images)[:, self.n_class_tokens :]
