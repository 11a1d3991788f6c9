"""LaVIT's dynamic tokenizer for pre-tokenization, with the selection of its patches.

# tokenizer.yaml
_target_: seed_multimodal.models.lavit.codes.lavit_codes
pretrained_model_name_or_path: pretrained/LaVIT-7B-v2
"""

from __future__ import annotations

from typing import Literal

import torch

from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.models.lavit.pipeline import LavitImageCodec
from seed_multimodal.pipelines.images import CodecPlacement
from seed_multimodal.weights.find import locate


def lavit_codes(
    pretrained_model_name_or_path: str,
    selection: Literal["draw", "threshold"] = "draw",
    seed: int = 0,
    device: str = "cpu",
) -> LavitImageCodec:
    """The codec of a folder's tokenizer.

    Raises CheckpointError, as `load_dynamic_tokenizer`.
    """
    folder = locate(pretrained_model_name_or_path) or pretrained_model_name_or_path
    tokenizer = load_dynamic_tokenizer(folder, device=device)
    return LavitImageCodec(tokenizer, None, CodecPlacement(torch.device(device)), selection, seed)
