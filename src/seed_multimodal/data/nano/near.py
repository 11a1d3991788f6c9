"""Pairs of pictures that look the same but for anti-aliasing (`small` and `large blue diamond` after the crop).

Such pairs must not sit on two sides of a split, so the builder puts them in one family.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# Mean absolute difference, in 8-bit steps, below which two pictures count as the same drawing.
NEAR = 2.6
_GRID = 16


def near_pairs(images: list[np.ndarray], limit: float = NEAR) -> list[tuple[int, int]]:
    """Index pairs (i < j) whose mean absolute difference is below `limit`.

    Args:
        images: uint8 [S, S, 3] each, of one size.
    """
    if len(images) < 2:
        return []
    small = np.stack([
        np.asarray(Image.fromarray(image).resize((_GRID, _GRID), Image.Resampling.BOX), np.float32).reshape(-1)
        for image in images
    ])
    # Averages differ by less than the pictures do, so comparing them first can only let too many through.
    mean = small.mean(1)
    order = np.argsort(mean, kind="stable")
    pairs = []
    for place, i in enumerate(order):
        stop = int(np.searchsorted(mean[order], mean[i] + limit + 1, "right"))
        others = order[place + 1:stop]
        close = others[np.abs(small[others] - small[i]).mean(1) < limit + 1]
        for j in close:
            difference = np.abs(images[i].astype(np.int16) - images[j].astype(np.int16)).mean()
            if difference < limit:
                pairs.append((int(min(i, j)), int(max(i, j))))
    return sorted(pairs)
