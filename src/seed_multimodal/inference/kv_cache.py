"""Keys and values of running and recently finished sequences, in tables of a fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError

GIB = 1 << 30
CPU_BYTES = 4 * GIB
# Tables of up to this size in all are written at load: page faults would slow the first answers.
EAGER_BYTES = GIB // 8
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


class KVCache:
    """Keys and values of every layer, `[rows, heads, length, head_dim]` each.

    `allocate` makes the tables, once. `begin` sets where the next pass writes and reads;
    transformers' models call `update`.
    """

    is_compileable = False  # asked by transformers; the engine compiles its own step

    def __init__(self, size: CacheSize) -> None:
        self.size = size
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._spare_row = torch.zeros(0)  # [heads, length, head_dim]
        self._written: tuple[Tensor, Tensor] = (torch.zeros(0), torch.zeros(0))
        self._span: int | tuple[Tensor, Tensor] = 0

    def begin(self, rows: Tensor, positions: Tensor, span: int | tuple[Tensor, Tensor]) -> None:
        """Set the rows and positions `[B, n]` of the next pass's tokens, and what they see.

        span: so many positions of each of the first rows, or the rows and positions `[1, K]` of
        tokens for a single sequence of several prompts.
        """
        self._written = (rows, positions)
        self._span = span

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, heads, n, head_dim]`; returns those of the span."""
        # Rows and positions are indexed together, so heads come behind them: [B, n, heads, D].
        rows, positions = self._written
        seen: list[Tensor] = []
        for table, new in zip(self.layers[layer], (keys, values), strict=True):
            table[rows, :, positions] = new.transpose(1, 2).to(table.dtype)
            if isinstance(self._span, int):
                seen.append(table[: len(new), :, : self._span])
            else:
                seen_rows, seen_positions = self._span
                seen.append(table[seen_rows, :, seen_positions].transpose(1, 2))
        return seen[0], seen[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._span if isinstance(self._span, int) else self._span[0].shape[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another."""
        for layer in self.layers:
            for table in layer:
                table[target, :, :length] = table[source, :, :length]

    def swap(self, row_a: int, row_b: int, length: int) -> None:
        """Exchange the first positions of two rows, without new memory: it cannot fail half-way."""
        content_a = self._spare_row[:, :length]
        for layer in self.layers:
            for table in layer:
                content_a.copy_(table[row_a, :, :length])
                table[row_a, :, :length] = table[row_b, :, :length]
                table[row_b, :, :length] = content_a

    def clear(self, row: int) -> None:
        """Zero a row: NaN in masked positions would reach the next sequence there."""
        for layer in self.layers:
            for table in layer:
                table[row].zero_()

    def allocate(
        self, n_layers: int, n_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the tables, of zeros: what attention masks has to be finite.

        Large ones on a CPU take memory only where they are written, page by page.
        """
        shape = (self.size.rows, n_heads, self.size.length, head_dim)
        n_bytes = 2 * n_layers * math.prod(shape) * dtype.itemsize
        is_lazy = device.type == "cpu" and n_bytes > EAGER_BYTES
        zeros = _lazy_zeros if is_lazy else torch.zeros
        for _ in range(n_layers):
            tables = []
            for _ in ("keys", "values"):
                table = zeros(shape, dtype=dtype, device=device)
                torch._dynamo.mark_static_address(table)  # CUDA graphs write to it in place
                tables.append(table)
            self.layers.append((tables[0], tables[1]))
        self._spare_row = zeros(shape[1:], dtype=dtype, device=device)

    def release(self) -> None:
        """Give the memory of the tables back."""
        self.layers.clear()
        self._spare_row = torch.zeros(0)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros on the CPU in memory that the kernel provides when it is first written."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(dtype).view(shape)
