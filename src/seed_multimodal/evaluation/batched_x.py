"""`SeedX` in batches, for measuring: the same prompts, answers and de-tokenizer, many at a time.

The report passes pictures on as codes. Here a code is the number of a picture that is kept: a given one, or the
features of one that the model has written, beside the picture that it was edited from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.nano.scene import SIZE
from seed_multimodal.evaluation.tasks import Codes
from seed_multimodal.images.any_resolution import AnyResolution
from seed_multimodal.language.continuous import Answer, Prompt
from seed_multimodal.language.seed_x import read_boxes, without_words
from seed_multimodal.language.tasks import answer_in
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
    image_size = SIZE

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
        return self._say([[self.kept[row[0]].picture, self.inner.tasks.describe] for row in codes])

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """Each question, as the system asks it, about its picture."""
        return self._say([[self.kept[row[0]].picture, self.inner.tasks.question(question)]
                          for row, question in zip(codes, questions, strict=True)])

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """The system's drawing request for each text; the number of the forced picture."""
        return self._written([[self.inner.tasks.draw_request(text)] for text in texts], [None] * len(texts))

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Each picture with its instruction; the answer's picture, which is forced where none came by itself."""
        sources = [self.kept[row[0]].picture for row in codes]
        contents = [[source, text] for source, text in zip(sources, instructions, strict=True)]
        room = self.inner.tokenizer.vocabulary.tokens_per_image + 2 + self.inner.tasks.edit_words
        found: list[Codes | None] = [
            self._keep(Kept(features=answer.features[0].cpu(), source=source)) if len(answer.features) else None
            for answer, source in zip(self._answers(contents, "edit", max_new_tokens=room), sources, strict=True)]
        left = [row for row, one in enumerate(found) if one is None]
        forced = self._written([contents[row] for row in left], [sources[row] for row in left], "edit")
        for row, one in zip(left, forced, strict=True):
            found[row] = one
        return found

    # ---- what SEED-X is asked beside

    def rebuild(self, pictures: Sequence[Image.Image], conditions: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures drawn again from the tower's features beside condition pictures."""
        return [self.inner.reconstruct(picture, condition, self.seed)[0]
                for picture, condition in zip(pictures, conditions, strict=True)]

    def detect(self, pictures: Sequence[Image.Image], phrases: Sequence[str], views: bool = True
               ) -> list[list[Corners]]:
        """The boxes (left, top, right, bottom in pixels) of each phrase in its picture; `views`: see `say`."""
        contents = [[picture, self.inner.tasks.detect_request(phrase)]
                    for picture, phrase in zip(pictures, phrases, strict=True)]
        grid = self.inner.prompts.vocabulary.n_locations
        with self._in_views(views):
            answers = self._answers(contents, "detect", max_new_tokens=LONGEST_TEXT)
        return [[box.corners(picture.size, grid) for box in read_boxes(answer.text, grid=grid)[0]]
                for picture, answer in zip(pictures, answers, strict=True)]

    def say(self, pictures: Sequence[Image.Image], requests: Sequence[str], views: bool = True) -> list[str]:
        """An answer in words to each request about its picture, which is read in one view without `views`."""
        with self._in_views(views):
            return self._say([[picture, request] for picture, request in zip(pictures, requests, strict=True)])

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

    def _say(self, contents: Sequence[list[Any]]) -> list[str]:
        return [answer_in(without_words(answer.text).strip(), self.inner.tasks.answer_after)
                for answer in self._answers(contents, "ask", max_new_tokens=LONGEST_TEXT)]

    def _written(self, contents: Sequence[list[Any]], sources: Sequence[Image.Image | None], task: str = "draw"
                 ) -> list[Codes | None]:
        room = self.inner.tokenizer.vocabulary.tokens_per_image + 1
        return [self._keep(Kept(features=answer.features[0].cpu(), source=source)) if len(answer.features) else None
                for answer, source in zip(self._answers(contents, task, max_new_tokens=room, force_image=True), sources,
                                          strict=True)]

    def _answers(self, contents: Sequence[list[Any]], task: str, **settings: Any) -> list[Answer]:
        """The model's answers, prompts of like length together."""
        prompts = [self.inner.prompt([("user", content)], task)[0] for content in contents]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
        given = replace(self.inner.settings(seed=self.seed), **settings)
        found: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch):
            rows = order[start:start + self.batch]
            chosen: list[Prompt] = [prompts[row] for row in rows]
            found |= dict(zip(rows, self.inner.agent.generate(chosen, given, self.inner.tokenizer), strict=True))
        return [found[row] for row in range(len(prompts))]


class _Views:
    """Pictures are read on these grids meanwhile (None: on the system's own)."""

    def __init__(self, system: SeedX, grids: tuple[str, ...] | None) -> None:
        self.pictures, self.own = system.pictures, system.pictures.views
        self.views = self.own if grids is None else AnyResolution(self.own.image_size, grids, self.own.interpolation)

    def __enter__(self) -> None:
        self.pictures.views = self.views

    def __exit__(self, *error: object) -> None:
        self.pictures.views = self.own
