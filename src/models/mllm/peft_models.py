"""The original's import path; see `seed_multimodal.compat`."""

from seed_multimodal.compat.lora import seed_x_lora as get_peft_model_with_resize_embedding

__all__ = ["get_peft_model_with_resize_embedding"]
