"""LaVIT's six aspect ratios; without torch, for programs that only name them."""

import math
from itertools import product

SIDE = 1024  # pixels of the original square

# Width : height → the original (height, width) in pixels.
RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}


def ratio_size(ratio: str, side: int, unit: int) -> tuple[int, int]:
    """Height and width of one of `RATIOS` for a model whose square has `side` pixels.

    The original size scaled, if that gives multiples of `unit`; otherwise the multiples that are
    nearest to the ratio and to the square's area.
    """
    # 1. The original size, scaled.
    original_height, original_width = RATIOS[ratio]
    height = original_height * side / SIDE
    width = original_width * side / SIDE
    if height % unit == width % unit == 0:
        return int(height), int(width)

    # 2. The nearest multiples; errors of ratio and area as logarithms, so that factors count alike.
    def distance(size: tuple[int, int]) -> float:
        aspect_error = math.log(size[1] / size[0]) - math.log(width / height)
        area_error = math.log(size[0] * size[1] / side**2)
        return math.hypot(aspect_error, area_error)

    lengths = range(unit, 2 * side + unit, unit)
    return min(product(lengths, lengths), key=distance)
