"""Resizing of pictures in the chat demo before they are sent: longer side, aspect ratio, square."""

from __future__ import annotations

from PIL import Image


def fit_longer_side(image: Image.Image, length: int = 512) -> Image.Image:
    """Resize (up or down) so that the longer side has `length` pixels; the other keeps the ratio, rounded down."""
    width, height = image.size
    longer = max(width, height)
    return image.resize((max(1, width * length // longer), max(1, height * length // longer)),
                        Image.Resampling.BICUBIC)


def crop_to_aspect(image: Image.Image, max_aspect: float = 1.3) -> Image.Image:
    """Cut the longer side, centred, so that it is at most `max_aspect` times the shorter one."""
    width, height = image.size
    new_width = min(width, int(height * max_aspect))
    new_height = min(height, int(width * max_aspect))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def chat_image(image: Image.Image) -> Image.Image:
    """A user's picture as the chat demo stores it: RGB, longer side 512, at most 1.3 times as long as wide."""
    return crop_to_aspect(fit_longer_side(image.convert("RGB"), 512), 1.3)


def request_image(image: Image.Image, size: int = 256) -> Image.Image:
    """A stored picture as the chat demo sends it: squashed to `size` x `size`."""
    return image.resize((size, size), Image.Resampling.BICUBIC)
