"""Several views of a picture: small scalings and shifts over white, which keep labels, colours and left/right true.

A view depends on the seed, the picture and the view's number only, so it is the same whatever else is encoded with it.
View 0 is the picture itself.
"""

from __future__ import annotations

import random

from PIL import Image

SCALE = (1 / 1.08, 1 / 0.88)  # of the window: below 1 the picture grows
SHIFT = 0.04  # of a side


def view(image: Image.Image, number: int, seed: int, name: str) -> Image.Image:
    """View `number` of an RGB picture, of its size.

    Args:
        name: the picture's; pictures of one name get equal views.
    """
    if number == 0:
        return image
    draw = random.Random(f"{seed} {name} {number}")
    scale = draw.uniform(*SCALE)
    width, height = image.size
    left = width * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    top = height * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    return image.transform(image.size, Image.Transform.AFFINE, (scale, 0, left, 0, scale, top),
                           resample=Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
