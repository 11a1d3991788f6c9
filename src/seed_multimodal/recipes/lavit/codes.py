"""LaVIT's dynamic tokenizer for pre-tokenization, with the selection of its patches.

# tokenizer.yaml
_target_: seed_multimodal.recipes.lavit.codes.lavit_codes
pretrained_model_name_or_path: pretrained/LaVIT-7B-v2
"""

from __future__ import annotations

from typing import Literal

import torch

from seed_multimodal.device import Runtime
from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.models.lavit.pipeline import LavitImageCodec
from seed_multimodal.pipelines.images import Placement
from seed_multimodal.weights.find import locate_or_same


def lavit_codes(
    pretrained_model_name_or_path: str,
    selection: Literal["draw", "threshold"] = "draw",
    seed: int = 0,
    device: str = "cpu",
) -> LavitImageCodec:
    """The codec of a folder's tokenizer.

    Raises CheckpointError, as `load_dynamic_tokenizer`.
    """
    folder = locate_or_same(pretrained_model_name_or_path)
    tokenizer = load_dynamic_tokenizer(folder, device=device)
    runtime = Runtime(torch.device(device), torch.float32)
    placement = Placement(runtime, runtime, runtime)
    return LavitImageCodec(tokenizer, None, placement, selection, seed)
