"""`Lavit` in batches, for measuring: what it says and draws one at a time, many at a time.

The report passes pictures on as codes. Here a code is the number of a picture that is kept: a given one, which the
language model reads as it is and writes from by its codes, or the codes of one that the model has written. Which
patches of a given picture are kept is drawn with a seed of its own: the report's, and the picture's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.evaluation.batched import Codes
from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.language.lemmatizer import Lemmatizer
from seed_multimodal.systems.lavit import Lavit

SQUARE, WIDE = "1:1", "3:2"
"""The ratios that are drawn in."""


@dataclass(frozen=True)
class Kept:
    """The codes of a picture; a given one itself, the seed of its selection, and the patches chosen `[g, g]` bool."""

    codes: list[int]
    picture: Image.Image | None = None
    seed: int = 0
    patches: Tensor | None = None


class BatchedLavit:
    """What `LavitRun` asks of a system, over a `Lavit`; `batch`: prompts or pictures at a time."""

    section = 1
    image_size = 64

    def __init__(self, lavit: Lavit, batch: int = 64, seed: int = 0) -> None:
        self.inner, self.batch, self.seed = lavit, batch, seed
        self.inner.log = self.inner.pictures.log = None  # the report shows how far it is
        self.inner.lemmatizer = Lemmatizer("none")  # answers count as the model says them, on any machine
        self.codebook_size = lavit.tokenizer.vocabulary.n_codes
        self.most = lavit.tokenizer.vocabulary.tokens_per_image  # tokens of a picture
        self.kept: list[Kept] = []

    @classmethod
    def from_pretrained(cls, model: Any, *, device: str = "auto", dtype: str = "auto",
                        quantization: str | None = None, batch: int = 64, seed: int = 0,
                        log: Callable[[str], None] | None = print) -> BatchedLavit:
        """Load a system folder that reads and draws; see `Lavit.from_pretrained` for errors."""
        lavit = Lavit.from_pretrained(model, device=device, dtype=dtype, quantization=quantization, log=log)
        lavit.spec.require("understanding", "decoder", "pixels")
        return cls(lavit, batch, seed)

    @property
    def device(self) -> torch.device:
        """Where pictures are read and made."""
        return self.inner.pictures.device

    @property
    def draws(self) -> bool:
        """Whether the patches of a picture are drawn, so that another seed gives other ones."""
        return self.inner.pictures.selection == "draw"

    def facts(self) -> dict[str, Any]:
        """Settings of the system that the numbers depend on."""
        defaults, settings = self.inner.pictures.decoder.pixels.defaults, self.inner.language.settings
        drawn: Any = settings("draw")
        return {"selection": self.inner.pictures.selection, "steps": defaults.num_inference_steps,
                "guidance": defaults.guidance_scale, "guidance of the language model": drawn.guidance,
                "temperature": drawn.temperature, "beams": settings("describe").num_beams,
                "dtype": str(self.inner.llm.dtype).removeprefix("torch.")}

    # ---- what all systems are asked

    def codes(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, H, W, 3] → their numbers [N, 1]."""
        given = [Image.fromarray(picture) for picture in pictures]
        seeds = self._seeds(range(len(given)))
        codes = self.inner.pictures.tokenize(given, seed=seeds)
        patches = self.inner.pictures.kept(given, seed=seeds)
        return np.array([self._keep(Kept(row.tolist(), *rest))
                         for row, *rest in zip(codes, given, seeds, patches, strict=True)], np.int64)

    def pictures(self, codes: Sequence[Codes], first: int | None = None, ratio: str = SQUARE) -> list[Image.Image]:
        """Pictures drawn from their codes."""
        if not codes:
            return []
        return self.inner.pictures.draw([one.codes for one in self._those(codes)], seed=self.seed, ratio=ratio,
                                        batch_size=self.batch, first=first)

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """A caption of each picture."""
        return self._in_batches(lambda part: self.inner.describe_all(
            [one.picture for one in part], seed=[one.seed for one in part]), self._those(codes))

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """Each question, as the system asks it, about its picture."""
        asked = list(zip(self._those(codes), questions, strict=True))
        return self._in_batches(lambda part: self.inner.ask_all(
            [one.picture for one, _ in part], [question for _, question in part], seed=[one.seed for one, _ in part]),
                                asked)

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """The picture that the model writes for each text; None where it writes no code."""
        return self._write([[text] for text in texts], "draw")

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """The picture that the model writes behind a picture and words."""
        return self._write([[one.codes, text] for one, text in zip(self._those(codes), instructions, strict=True)],
                           "compose")

    # ---- what LaVIT is asked beside

    def join(self, codes: Sequence[Codes], others: Sequence[Codes]) -> list[Codes | None]:
        """The picture that the model writes behind two pictures."""
        return self._write([[one.codes, other.codes] for one, other in
                            zip(self._those(codes), self._those(others), strict=True)], "compose")

    def tokens(self, codes: Sequence[Codes]) -> list[list[int]]:
        """The codes that the numbers stand for."""
        return [one.codes for one in self._those(codes)]

    def patches(self, codes: Sequence[Codes]) -> list[NDArray[np.bool_]]:
        """Which patches of given pictures are kept `[g, g]`."""
        return [one.patches.numpy() for one in self._those(codes) if one.patches is not None]

    @torch.inference_mode()
    def losses(self, codes: Sequence[Codes]) -> tuple[FloatArray, FloatArray]:
        """How far the features that the decoder makes of each picture's codes are from the tower's: the mean over
        patches of 1 − cosine, [N]; and the same for the mean picture in the place of every one (`blind`)."""
        half, seen, rebuilt = self.inner.pictures, [], []
        for start in range(0, len(codes), self.batch):
            chosen = self._those(codes[start:start + self.batch])
            with half.reading():
                assert half.writer is not None
                pixels = half.writer.pixels([half.open(one.picture) for one in chosen if one.picture is not None])
                seen.append(half.writer.patch_features(pixels).float().cpu())
                rows = [half.writer.embed_codes(torch.tensor(one.codes, device=half.writer.device)) for one in chosen]
            with half.drawing():
                rebuilt.append(half.decoder.decoder.features(rows).float().cpu())
        true = torch.cat(seen)
        found = (1 - F.cosine_similarity(true, other, dim=-1).mean(1) for other in
                 (torch.cat(rebuilt), true.mean(0, keepdim=True).expand_as(true)))
        near, blind = (row.numpy() for row in found)
        return near, blind

    # ---- inside

    def _keep(self, one: Kept) -> Codes:
        self.kept.append(one)
        return [len(self.kept) - 1]

    def _seeds(self, rows: range) -> list[int]:
        return [self.seed + row for row in rows]

    def _those(self, codes: Sequence[Codes]) -> list[Kept]:
        return [self.kept[row[0]] for row in codes]

    def _in_batches(self, work: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
        return [one for start in range(0, len(items), self.batch) for one in work(items[start:start + self.batch])]

    def _write(self, prompts: list[list[Any]], task: str) -> list[Codes | None]:
        seeds = self._seeds(range(len(prompts)))
        written = self._in_batches(lambda part: self.inner.write(
            [prompt for prompt, _ in part], task, seed=[seed for _, seed in part]),
                                   list(zip(prompts, seeds, strict=True)))
        return [self._keep(Kept(one.codes.tolist())) if len(one.codes) else None for one in written]
