"""Frames of a video, by OpenCV: the middles of `num_frames` equal stretches, as the released pipe took them.

The released pipe gave the transform a tensor, which it cannot take, so that every video was dropped; here frames are
ordinary pictures, resized as all others.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.data.llm.pretokenize.samples import Picture, Sample
from seed_multimodal.errors import ImageError


def frames(sample: Sample, value: str, count: int) -> list[Picture]:
    """The pictures of `count` frames of the video that a field names; the file is opened when the first is loaded."""
    path = sample.path(value)
    name = f"{sample.where}: {value}"
    reader = _Frames(path, name, count)
    key = "" if path is None else f"{path}@{count}:"
    return [Picture(f"{name} frame {number}", partial(reader.frame, number), key and f"{key}{number}")
            for number in range(count)]


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of `count` equal stretches of `total` frames (short videos repeat some)."""
    return [min(total - 1, int((number + 0.5) * total / count)) for number in range(count)]


class _Frames:
    def __init__(self, path: Path | None, name: str, count: int) -> None:
        self.path, self.name, self.count = path, name, count
        self._read: list[Image.Image] = []

    def frame(self, number: int) -> Image.Image:
        """One of the frames, RGB.

        Raises:
            ImageError: no such file, no video, or a frame that cannot be decoded.
        """
        if not self._read:
            self._read = self._load()
        return self._read[number]

    def _load(self) -> list[Image.Image]:
        import cv2

        if self.path is None:
            raise ImageError(f"{self.name}: there is no such video.")
        video = cv2.VideoCapture(str(self.path))
        try:
            total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
            if total < 1:
                raise ImageError(f"{self.name}: not a video in a known format, or without frames.")
            places = middles(total, self.count)
            # Each once: after the only frame of a video, going back to it gives nothing.
            read = {place: self._frame(video, cv2, place) for place in dict.fromkeys(places)}
            return [read[place] for place in places]
        finally:
            video.release()

    def _frame(self, video: Any, cv2: Any, place: int) -> Image.Image:
        video.set(cv2.CAP_PROP_POS_FRAMES, place)
        good, pixels = video.read()
        if not good:
            raise ImageError(f"{self.name}: frame {place} cannot be decoded; the video is cut off or damaged.")
        return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
