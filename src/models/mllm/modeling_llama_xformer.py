"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.seed_x import LlamaForCausalLM

__all__ = ["LlamaForCausalLM"]
