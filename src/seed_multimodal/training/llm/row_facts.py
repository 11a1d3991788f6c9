"""What only a batch's values tell, found on the CPU before the batch goes to its device.

A forward pass that looked for it on a GPU would wait there until all earlier work is done: which positions have a
target, whether rows hold several sequences, where those end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seed_multimodal.device import copy_to

IGNORED = -100


class RowFacts(NamedTuple):
    """Of a batch `[B, L]`.

    Attributes:
        learned: places in the flattened `[B, L - 1]` that have a target, int64 `[T]`, in order; with `texts` those of
            text first.
        texts: how many of `learned` predict text; -1: in order, not counted.
        masked: whether the attention mask says more than that rows end in padding.
        packed: whether a row holds several sequences.
        ends: int32, 0 and where each sequence of all rows laid end to end ends; longest: the longest of them.
    """

    learned: Tensor
    texts: int
    masked: bool
    packed: bool
    ends: Tensor
    longest: int

    def to(self, device: torch.device) -> RowFacts:
        """The same on a device."""
        return self._replace(learned=copy_to(device, self.learned), ends=copy_to(device, self.ends))

    @property
    def flash(self) -> dict[str, Any]:
        """transformers' arguments for flash attention over rows laid end to end."""
        return {"cu_seq_lens_q": self.ends, "cu_seq_lens_k": self.ends, "max_length_q": self.longest,
                "max_length_k": self.longest}


def row_facts(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None,
              first_code: int | None = None) -> RowFacts:
    """The facts of a batch's tensors `[B, L]`, all on the CPU.

    Args:
        first_code: ids from here on are images'; given, text comes first among the learned places.
    """
    positions = None if attention_mask is not None else position_ids
    targets = learned_targets(labels, positions).flatten()
    learned, texts = (targets != IGNORED).nonzero().flatten(), -1
    if first_code is not None:
        image = targets[learned] >= first_code
        learned, texts = torch.cat([learned[~image], learned[image]]), int((~image).sum())
    starts = torch.zeros(0, dtype=torch.int64)
    if positions is not None:
        starts = (positions.expand_as(labels).flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([labels.numel()])])
    mask = attention_mask
    return RowFacts(learned, texts, masked=mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()),
                    packed=len(starts) > len(labels), ends=ends.int(),
                    longest=int(ends.diff().max()) if len(starts) else 0)


def learned_targets(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """What each position but the last has to predict: `[B, L]` → `[B, L-1]`, -100 where nothing."""
    targets = labels[:, 1:]
    if position_ids is None:
        return targets
    return targets.masked_fill(position_ids.expand_as(labels)[:, 1:] == 0, IGNORED)


@contextmanager
def packing_known(packed: bool | None) -> Iterator[None]:
    """Inside, transformers is told whether rows are packed (None: it is not), where it would look at the positions of
    every batch, on the device, and wait."""
    from transformers import masking_utils

    look: Callable[[Tensor], Tensor | None] | None = getattr(masking_utils, "find_packed_sequence_indices", None)
    if packed is None or look is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = _sequence_numbers if packed else _one_sequence
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _sequence_numbers(position_ids: Tensor) -> Tensor:
    """Positions `[B, L]` → number of the sequence that each belongs to."""
    before = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)


def _one_sequence(position_ids: Tensor) -> None:
    """No row holds more than one sequence."""
