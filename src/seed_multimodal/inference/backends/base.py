"""The protocol between the engine (which row, which token) and what computes; size of its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.prompt import Prompt, PromptInput

GIB = 1 << 30
CPU_BYTES = 4 * GIB
GPU_SHARE = 0.5  # of the memory that is free after loading; the rest is for images and activations
MIN_LENGTH = 64  # positions of a useful row


@dataclass(frozen=True)
class CacheSize:
    """Rows (sequences at once) and positions of each; the last position is for padding."""

    rows: int
    length: int

    @property
    def capacity(self) -> int:
        """Tokens of a sequence at most."""
        return self.length - 1


def plan_cache(bytes_per_token: int, context: int, budget: int, max_rows: int) -> CacheSize:
    """As many rows of a whole context as the budget holds, up to `max_rows`; else one shorter row.

    Raises ConfigError: the budget holds no useful row.
    """
    length = context + 1
    rows = min(max_rows, budget // (bytes_per_token * length))
    if rows >= 1:
        return CacheSize(rows, length)
    length = budget // bytes_per_token
    if length < MIN_LENGTH:
        raise ConfigError(
            f"The KV cache needs {bytes_per_token * MIN_LENGTH / GIB:.3g} GiB at least, but "
            f"{budget / GIB:.3g} GiB are free for it: give more by --kv-cache, or use a smaller or "
            "quantised model."
        )
    return CacheSize(1, length)


def default_budget(device: torch.device) -> int:
    """Bytes for keys and values: half of a GPU's free memory; a fixed number on other devices."""
    if device.type != "cuda":
        return CPU_BYTES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(GPU_SHARE * free_bytes)


@dataclass(frozen=True)
class PromptChunk:
    """Tokens `start` to `stop` of a prompt, for one row of the cache, which holds those before.

    row: its index. prompt_input: what `Backend.prepare` returned.
    position_ids: of the whole prompt, see `Prompt`.
    """

    row: int
    prompt_input: PromptInput
    start: int
    stop: int
    position_ids: Tensor | None = None


@dataclass(frozen=True)
class NextTokens:
    """What a pass computed for each row.

    scores: float32 `[B, V]`, of the next token.
    states: last hidden states `[B, D]`; None: the backend has none.
    """

    scores: Tensor
    states: Tensor | None


class Backend(Protocol):
    """Computes in rows of a KV cache; all methods are called by the engine's thread.

    context: positions of the model. device: of the scores.
    cheap_copies: whether copying a prefix costs less than computing it.
    has_axes: whether it computes with `Prompt.position_ids`.
    """

    context: int
    device: torch.device
    cache_size: CacheSize
    cheap_copies: bool
    has_axes: bool

    @property
    def search(self) -> Callable[..., None] | None:
        """Beam search (see `TorchBackend`); None: the backend has none."""

    def ready(self) -> AbstractContextManager[None]:
        """Context with the weights on their device; outside of it the backend is idle."""
        ...

    def weights(self) -> object:
        """A value that changes with the weights: rows that were computed before are not reused."""
        ...

    def prepare(self, prompt: Prompt) -> PromptInput:
        """The form in which chunks of a prompt are read."""
        ...

    def prefill(self, chunks: Sequence[PromptChunk]) -> NextTokens:
        """Read pieces of prompts; the scores are those after each one's last token."""
        ...

    def decode(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        position_ids: Sequence[Tensor | None] = (),
    ) -> NextTokens:
        """Read one token in each row from 0 on, at its slot of the row.

        position_ids: of each row's prompt, see `Prompt`; read where `has_axes`.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another; called only with `cheap_copies`."""
        ...

    def swap(self, row_a: int, row_b: int, length_a: int, length_b: int) -> None:
        """Exchange two rows, of which the first `length_a` and `length_b` positions are used."""
        ...

    def clear(self, row: int) -> None:
        """Forget a row whose numbers are damaged."""
        ...
