"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_x import process_anyres_image

__all__ = ["process_anyres_image"]
