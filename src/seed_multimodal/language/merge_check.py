"""Check of a merged model against its base and adapter: logits of a few sequences, through peft and without.

An independent path: stock transformers and peft compute the expected logits; only the adapter's tensors are shared.
"""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.language.adapters import PREFIX, TrainedTensors
from seed_multimodal.language.llama import BOS, load_llm

SEQUENCES, LENGTH = 3, 24
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
# Largest relative difference of the logits (root mean square) by the precision the result is stored in.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def compare_logits(base: Path, trained: TrainedTensors, folder: Path) -> float:
    """Relative difference of the logits of base + adapter and of `folder`, both computed in fp32.

    Raises:
        CheckpointError: it is larger than rounding to the stored precision.
    """
    expected, ids = expected_logits(base, trained)
    gc.collect()
    merged = load_llm(folder)
    stored = _stored(folder)
    with torch.no_grad():
        found = merged(input_ids=ids).logits
    difference = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not difference <= TOLERANCES[stored]:
        raise CheckpointError("The merged model differs from base and adapter: its logits differ by "
                              f"{difference:.1e} (relative), where {str(stored).removeprefix('torch.')} allows "
                              f"{TOLERANCES[stored]:.0e}; nothing was kept.")
    return difference


@torch.no_grad()
def expected_logits(base: Path, trained: TrainedTensors) -> tuple[Tensor, Tensor]:
    """Logits `[S, L, words]` of base and adapter through peft, and the seeded ids `[S, L]`."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    llama = load_llm(base)
    state = trained.state()
    ends = [state[name] for name in (EMBEDDING, HEAD) if name in state]
    rows = len(ends[0]) if ends else llama.config.vocab_size
    tied = bool(llama.config.tie_word_embeddings and EMBEDDING in state and (
        HEAD not in state or torch.equal(state[EMBEDDING], state[HEAD])))
    if tied:
        state.setdefault(HEAD, state[EMBEDDING])
    if rows != llama.config.vocab_size:
        llama.resize_token_embeddings(rows, mean_resizing=False)
    known = inspect.signature(LoraConfig).parameters
    # A copy, because peft changes the lists it is given.
    values = {key: copy.deepcopy(value) for key, value in trained.config.items()
              if key in known and key != "inference_mode"}
    values["ensure_weight_tying"] = tied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = get_peft_model(llama, LoraConfig(**values))
            result = set_peft_model_state_dict(model, state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{trained.source}: peft cannot load it ({first_line(error)}).") from error
    if result.unexpected_keys:
        raise CheckpointError(f"{trained.source}: peft does not know {result.unexpected_keys[0]!r}.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, rows, (SEQUENCES, LENGTH), generator=generator)
    ids[:, 0] = BOS
    return model.eval()(input_ids=ids).logits, ids


def _stored(folder: Path) -> torch.dtype:
    """Lowest precision in a merged folder."""
    from seed_multimodal.language.shards import Shards

    return min({entry.dtype for entry in Shards(folder).entries.values()}, key=lambda kind: torch.finfo(kind).bits,
               default=torch.float32)
