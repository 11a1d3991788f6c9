"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.part_files import (
    language_model as get_pretrained_llama_causal_model,
)

__all__ = ["get_pretrained_llama_causal_model"]
