"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.seed.original import ImageTokenizer, SeedLlamaTokenizer

__all__ = ["ImageTokenizer", "SeedLlamaTokenizer"]
