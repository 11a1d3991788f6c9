"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_llama import ImageTokenizer, SeedLlamaTokenizer

__all__ = ["ImageTokenizer", "SeedLlamaTokenizer"]
