"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_x import Resampler, VisionTransformerWithAttnPool

__all__ = ["Resampler", "VisionTransformerWithAttnPool"]
