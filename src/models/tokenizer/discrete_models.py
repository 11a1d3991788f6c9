"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_x import DiscreteModleIdentity

__all__ = ["DiscreteModleIdentity"]
