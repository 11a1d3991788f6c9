"""The original's `utils` that notebooks import. The weights are loaded in the precision of
`model_dtype` already."""


def convert_weights_to_bf16(model: object) -> None:
    """Without effect: give `model_dtype="bf16"` when the model is built."""


def convert_weights_to_fp16(model: object) -> None:
    """Without effect: give `model_dtype="fp16"` when the model is built."""
