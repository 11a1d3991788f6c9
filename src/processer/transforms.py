"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.images.transforms import get_transform

__all__ = ["get_transform"]
