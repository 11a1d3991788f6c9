"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.detokenizer import SDXLAdapter, SDXLAdapterWithLatentImage

__all__ = ["SDXLAdapter", "SDXLAdapterWithLatentImage"]
