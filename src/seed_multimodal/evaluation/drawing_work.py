"""Drawings of captions: as SEED's released script makes them, or the best of several by CLIP, with their distance (FID)
from the pictures that the captions describe.

    work, score = Drawing(benchmark, path, texts, folder, decode, seed).work(limit)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.caption_files import CaptionedPicture
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.disk import writing
from seed_multimodal.errors import GenerationError, ImageError
from seed_multimodal.evaluation.answer_folder import Line, Score, Work
from seed_multimodal.evaluation.asking import Benchmark
from seed_multimodal.evaluation.benchmark_work import file_identity
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings

# Of the released caption-to-picture script.
DRAWING = GenerationSettings(temperature=0.0, num_beams=4, max_new_tokens=120, do_sample=False)
DRAWING_GUIDANCE = 5.0


class Drawing:
    """Pictures of captions, each steered away from what the model draws without any, as in the released script.

    Args:
        path: the file of the captions; None: they come from elsewhere.
        folder: where pictures go, as NUMBER_CAPTION.jpg.
        decode: settings of the de-tokenizer.
    """

    def __init__(self, benchmark: Benchmark, path: Path | None, texts: Sequence[CaptionedPicture], folder: Path,
                 decode: Mapping[str, Any], seed: int) -> None:
        self.benchmark, self.folder, self.decode, self.seed = benchmark, folder, dict(decode), seed
        self.texts, self.keys = texts, [one.key for one in texts]
        self.settings = {"task": "drawing", "captions": None if path is None else file_identity(path), "seed": seed,
                         "decode": self.decode, **benchmark.facts()}

    def work(self, limit: int | None) -> tuple[Work[tuple[int, str]], Score]:
        """As `question_work`; nothing is scored."""
        return Work(self, self.answer, self.settings, limit), Score(_drawn)

    def read(self, number: int) -> tuple[int, str]:
        """The caption with its number. Raises BadRecord: an empty one."""
        text = self.texts[number].checked().captions[0].strip()
        if not text:
            raise BadRecord("empty text", f"{self.texts[number].name}: its caption is empty.")
        return number, text

    def answer(self, block: list[tuple[int, str]]) -> list[Line]:
        """Draw and save. Raises GenerationError: an answer without a whole picture."""
        system = self.benchmark.system.inner
        chat, tasks = self.benchmark.prompts == "chat", system.tasks
        opening = system.tokenizer.encode_parts([tasks.draw_response]) if chat and tasks.draw_response else []
        codes = self.codes([[*self.benchmark.prompt(tasks.draw_request(text) if chat else text), *opening]
                            for _, text in block])
        made = system.pictures.draw(codes, negative_codes=self.negative, seed=self.seed, batch_size=len(block),
                                    **self.decode)
        lines = []
        for (number, text), row, image in zip(block, codes, made, strict=True):
            path = self.folder / f"{number:06d}_{_file_stem(text)}.jpg"
            with writing(path, ImageError):
                image.save(path)
            lines.append({"caption": text, "codes": row, "picture": path.name})
        return lines

    @cached_property
    def negative(self) -> list[list[int]]:
        """The codes that follow `<s><img>`, [1, 32]."""
        return self.codes([[self.benchmark.system.inner.tokenizer.bos_id]])

    def codes(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The codes that follow `<img>` after each prompt."""
        system = self.benchmark.system
        settings = replace(self.benchmark.settings, force_image=True)
        found = []
        for ids in system.generate(prompts, settings):
            drawn = [part.codes for part in split_answer(ids, system.inner.tokenizer) if isinstance(part, ImagePart)]
            if not drawn:
                raise GenerationError("The model's answer holds no whole picture.")
            found.append(list(drawn[0]))
        return found


def _drawn(lines: Sequence[Line]) -> Any:
    return [{key: line[key] for key in ("id", "caption", "picture") if key in line} for line in lines]


def _file_stem(text: str) -> str:
    """A caption as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text).strip("_")[:60] or "picture"
