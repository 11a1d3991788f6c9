"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.detokenizer import ResamplerXLV2

__all__ = ["ResamplerXLV2"]
