"""diffusers' pipeline of a tiny GLM-Image, as the comparison of tests."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from seed_glm_image.tiny import END, N_CODES, N_HEAD, START, tiny_parts

SHORTEST, LONGEST = 64, 256  # sides of source images
__all__ = ["END", "LONGEST", "N_CODES", "SHORTEST", "START", "picture", "pipeline"]


def pipeline(seed: int = 0) -> Any:
    """The pipeline, with its mended editing."""
    from diffusers import GlmImagePipeline
    from transformers import GenerationConfig

    pipe = GlmImagePipeline(**tiny_parts(seed))
    pipe.set_progress_bar_config(disable=True)
    model = pipe.vision_language_encoder
    # The library has no constraints: an early end crashes its pipeline.
    model.generation_config = GenerationConfig(
        eos_token_id=END,
        pad_token_id=model.config.text_config.pad_token_id,
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        top_k=50,
        suppress_tokens=list(range(N_CODES, N_HEAD)),
    )
    mend_editing(model)
    return pipe


def mend_editing(model: Any) -> None:
    """See `docs/explanation/glm_image.md`: the two libraries disagree about features of images."""
    features, tokens = model.get_image_features, model.get_image_tokens

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = features(*args, **kwargs)
        if not kwargs.get("return_dict"):  # called by the pipeline, not by `generate`
            output.pooler_output = [state.flatten(1).T for state in output.pooler_output]
        return output

    def get_image_tokens(states: Any, grids: Any = None) -> Any:
        if isinstance(states, torch.Tensor):
            rows = states.split(grids.prod(-1).tolist())
            sizes = [grid[1:] for grid in grids.tolist()]
            states = [row.T.reshape(-1, *size) for row, size in zip(rows, sizes, strict=True)]
        return tokens(states)

    model.get_image_features, model.get_image_tokens = get_image_features, get_image_tokens


def picture(width: int, height: int) -> Image.Image:
    """A gradient."""
    x = torch.linspace(0, 255, width).repeat(height, 1)
    y = torch.linspace(255, 0, height)[:, None].repeat(1, width)
    return Image.fromarray(torch.stack([x, y, 255 - x], -1).to(torch.uint8).numpy())
