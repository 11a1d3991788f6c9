"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_1 import SEEDVisualTokenizer

__all__ = ["SEEDVisualTokenizer"]
