"""What LaVIT's pixel decoders are steered away from: zeros, or the embeddings of the empty text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import LAVIT_WHERE
from seed_multimodal.weights import read_tensor

UNCONDITIONAL = "uncond_embeddings.bin"


def is_sdxl(unet: Any) -> bool:
    """Whether a U-Net reads pooled embeddings and sizes, as SDXL's."""
    return unet.config.addition_embed_type == "text_time"


def unconditional(prompt: Tensor, nothing: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What guidance steers away from, `[B, N, W]` as a prompt, and which of its embeddings are there (None: all).

    Raises:
        CheckpointError: the empty text's embeddings `[1, L, W]` are longer than a prompt.
    """
    made = torch.zeros_like(prompt)
    if nothing is None:
        return made, None
    length = nothing.shape[1]
    if length > prompt.shape[1]:
        raise CheckpointError(f"{UNCONDITIONAL} holds {length} embeddings, but a prompt has {prompt.shape[1]}: "
                              f"decoder and pixel decoder do not belong together.")
    made[:, :length] = nothing.to(prompt)
    return made, (torch.arange(prompt.shape[1], device=prompt.device) < length).expand(len(prompt), -1)


def empty_text(place: Path, width: int) -> Tensor:
    """The empty text's embeddings `[1, L, W]` of a folder of the second kind."""
    file = place / UNCONDITIONAL
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file: a U-Net of Stable Diffusion 1's kind is steered away "
                              f"from the empty text; {LAVIT_WHERE}.")
    value = read_tensor(file)
    value = value if value.ndim == 3 else value[None]
    if value.ndim != 3 or len(value) != 1 or value.shape[2] != width:
        raise CheckpointError(f"{file}: must hold a tensor [1, L, {width}], got {list(value.shape)}.")
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file}: holds NaN or infinity, so it is damaged; get it again.")
    return value.float()
