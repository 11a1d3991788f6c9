"""`SeedX` in batches, for measuring: the same prompts, answers and de-tokenizer, many at a time.

The report passes pictures on as codes. Here a code is the number of a picture that is kept: a given one, or the
features of one that the model has written, beside the picture that it was edited from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.evaluation.batched import Codes
from seed_multimodal.images.any_resolution import AnyResolution
from seed_multimodal.systems.seed_x import SeedX

LONGEST_TEXT = 110
Corners = tuple[int, int, int, int]


@dataclass
class Kept:
    """A picture, or the features `[N, W]` of one that was written, and the picture that it was edited from."""

    picture: Image.Image | None = None
    features: Tensor | None = None
    source: Image.Image | None = None


class BatchedSeedX:
    """What `XRun` asks of a system, over a `SeedX` that follows instructions; `batch`: prompts at a time."""

    codebook_size = section = 1
    image_size = 64

    def __init__(self, seed_x: SeedX, batch: int = 64, seed: int = 0) -> None:
        self.inner, self.batch, self.seed = seed_x, batch, seed
        self.kept: list[Kept] = []

    @classmethod
    def from_pretrained(cls, model: Any, *, device: str = "auto", dtype: str = "auto",
                        quantization: str | None = None, batch: int = 64, seed: int = 0,
                        log: Callable[[str], None] | None = print) -> BatchedSeedX:
        """Load a system folder; see `SeedX.from_pretrained` for errors."""
        return cls(SeedX.from_pretrained(model, device=device, dtype=dtype, quantization=quantization, log=log), batch,
                   seed)

    @property
    def device(self) -> torch.device:
        """Where pictures are read and made."""
        return self.inner.pictures.device

    def facts(self) -> dict[str, Any]:
        """Settings of the system that the numbers depend on."""
        defaults, settings = self.inner.pictures.decoder.defaults, self.inner.settings()
        return {"steps": defaults.num_inference_steps, "guidance": defaults.guidance_scale, "beams": settings.num_beams,
                "sampling": settings.samples, "dtype": str(self.inner.llm.dtype).removeprefix("torch.")}

    # ---- what all systems are asked

    def codes(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, H, W, 3] → their numbers [N, 1]."""
        return np.array([self._keep(Kept(Image.fromarray(picture))) for picture in pictures], np.int64)

    def pictures(self, codes: Sequence[Codes], first: int | None = None) -> list[Image.Image]:
        """Given pictures drawn again from the tower's features, written ones from the model's."""
        return [self._drawn(self.kept[row[0]]) for row in codes]

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """The system's usual request for a description, about each picture."""
        return self.inner.describe_all([self.kept[row[0]].picture for row in codes], **self._short())

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """Each question, as the system asks it, about its picture."""
        return self.inner.ask_all([self.kept[row[0]].picture for row in codes], questions, **self._short())

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """The system's drawing request for each text; the number of the forced picture."""
        return self._written([[self.inner.tasks.draw_request(text)] for text in texts], "draw")

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Each picture with its instruction; the answer's picture, which is forced where none came by itself."""
        return self._written([[self.kept[row[0]].picture, text] for row, text in zip(codes, instructions, strict=True)],
                             "edit")

    # ---- what SEED-X is asked beside

    def rebuild(self, pictures: Sequence[Image.Image], conditions: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures drawn again from the tower's features beside condition pictures."""
        return [self.inner.reconstruct(picture, condition, self.seed)[0]
                for picture, condition in zip(pictures, conditions, strict=True)]

    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[str], views: bool = True
               ) -> list[list[Corners]]:
        """The boxes (left, top, right, bottom in pixels) of each phrase in its picture; `views`: see `say`."""
        with self._in_views(views):
            return [one.boxes for one in self.inner.detect_all(pictures, phrases, **self._short())]

    def say(self, pictures: Sequence[Image.Image], requests: Sequence[str], views: bool = True) -> list[str]:
        """An answer in words to each request about its picture, which is read in one view without `views`."""
        with self._in_views(views):
            return self.inner.describe_all(pictures, requests, **self._short())

    # ---- inside

    def _in_views(self, several: bool) -> Any:
        return _Views(self.inner, None if several else ("1x1",))

    def _keep(self, one: Kept) -> Codes:
        self.kept.append(one)
        return [len(self.kept) - 1]

    def _drawn(self, one: Kept) -> Image.Image:
        pictures = self.inner.pictures
        if one.features is None:
            return pictures.rebuild(one.picture, seed=self.seed)[0]  # type: ignore[arg-type]
        shown = [one.source] if pictures.reads_condition else None
        return pictures.draw(one.features[None], seed=self.seed, conditions=shown)[0]

    def _short(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch, "max_new_tokens": LONGEST_TEXT}

    def _written(self, contents: Sequence[list[Any]], task: str) -> list[Codes | None]:
        return [self._keep(Kept(features=one.images[0], source=one.source)) if len(one.images) == 1 else None
                for one in self.inner.write_all(contents, task, batch_size=self.batch, seed=self.seed)]


class _Views:
    """Pictures are read on these grids meanwhile (None: on the system's own)."""

    def __init__(self, system: SeedX, grids: tuple[str, ...] | None) -> None:
        self.pictures, self.own = system.pictures, system.pictures.views
        self.views = self.own if grids is None else AnyResolution(self.own.image_size, grids, self.own.interpolation)

    def __enter__(self) -> None:
        self.pictures.views = self.views

    def __exit__(self, *error: object) -> None:
        self.pictures.views = self.own
