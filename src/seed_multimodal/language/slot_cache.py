"""`SlotCache`: keys and values of many prompts, each at its own position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEP = 128  # the cache grows in multiples of so many positions


class SlotCache:
    """Keys and values of every layer, `[slots, H, length, d]` each; every row is written at its own positions."""

    copies = True  # parts of rows

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # row of the present pass
        self.positions = torch.zeros(0)  # of its tokens, [rows, n]
        self.slots = self.length = self.used = 0

    def grow(self, slots: int, length: int) -> None:
        """Grow to this number of rows and positions."""
        self.slots, self.length = max(self.slots, slots), max(self.length, -(-length // STEP) * STEP)
        for number, layer in enumerate(self.layers):
            if layer[0].shape[::2] != (self.slots, self.length):
                new = [old.new_zeros(self.slots, old.shape[1], self.length, old.shape[3]) for old in layer]
                for table, old in zip(new, layer, strict=True):
                    table[:len(old), :, :old.shape[2]] = old
                self.layers[number] = (new[0], new[1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a row to another."""
        for layer in self.layers:
            for table in layer:
                table[target, :, :length] = table[source, :, :length]

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        for layer in self.layers:
            for table in layer:
                table[[one, other]] = table[[other, one]]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[rows, H, n, d]`; returns those of the rows up to `used`. transformers calls it."""
        if layer == len(self.layers):
            self.layers.append(tuple(new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
                                     for new in (keys, values)))
            for table in self.layers[layer]:
                torch._dynamo.mark_static_address(table)  # CUDA graphs write to it in place
        rows = torch.arange(self.first, self.first + len(keys), device=keys.device)[:, None]
        held_keys, held_values = self.layers[layer]
        held_keys[rows, :, self.positions] = keys.transpose(1, 2)
        held_values[rows, :, self.positions] = values.transpose(1, 2)
        present = slice(self.first, self.first + len(keys))
        return held_keys[present, :, :self.used], held_values[present, :, :self.used]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used
