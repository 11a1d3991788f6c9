"""Drawings of captions: as SEED's released script makes them, or the best of several by CLIP, with their distance (FID)
from the pictures that the captions describe.

    work, score = Drawing(benchmark, path, texts, folder, decode, seed).work(limit)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.data.formats.caption_files import CaptionedPicture
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.disk import replacing, writing
from seed_multimodal.errors import ConfigError, DataError, GenerationError, counted
from seed_multimodal.evaluation.answer_folder import Line, Score, Work
from seed_multimodal.evaluation.asking import AnySystem, Benchmark
from seed_multimodal.evaluation.benchmark_work import file_identity
from seed_multimodal.evaluation.picture_scores import ClipScores, Distance
from seed_multimodal.images.open import open_image
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
        return number, caption_text_of(self.texts[number])

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
            lines.append({"caption": text, "codes": row, "picture": save_drawing(image, self.folder, number, text)})
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
    """A caption as a part of a file's name, which may have 255 bytes, the scratch file's, too."""
    stem = "".join(letter if letter.isalnum() else "_" for letter in text).strip("_")[:60]
    return stem.encode()[:180].decode(errors="ignore") or "picture"


@dataclass
class BestOf:
    """Several drawings of each caption, of which CLIP's best is kept, as LaVIT's evaluation does.

    Attributes:
        path: the file of the captions; the pictures that they describe are looked for as it says.
        folder: where pictures go, as NUMBER_CAPTION.png.
        count: drawings of each. seed: of the first drawing of the first caption; each drawing has one of its own.
        clip: what chooses; None, of one drawing each, where there is none.
        distance: FID, of captions with pictures.
    """

    asked: AnySystem
    path: Path
    texts: Sequence[CaptionedPicture]
    folder: Path
    count: int = 4
    seed: int = 0
    clip: ClipScores | None = None
    distance: Distance | None = None

    def work(self, limit: int | None = None) -> tuple[Work[tuple[int, str]], Score]:
        """As `question_work`. Raises ConfigError: several drawings, and nothing to choose with."""
        if self.clip is None and self.count > 1:
            raise ConfigError(f"The best of {self.count} drawings is chosen by a CLIP; name one, or draw one picture.")
        settings = {"task": "text2image", "captions": file_identity(self.path), "seed": self.seed, "count": self.count,
                    "clip": None if self.clip is None else self.clip.name, **self.asked.facts()}
        return Work(self, self.answer, settings, limit), Score(_drawn, self.numbers)

    @property
    def keys(self) -> list[int | str]:
        """The captions' names."""
        return [one.key for one in self.texts]

    def read(self, number: int) -> tuple[int, str]:
        """The caption with its number. Raises BadRecord: an empty one. ImageError: its picture, which FID needs at the
        end of the run, cannot be read."""
        one = self.texts[number].checked()
        if self.distance is not None and one.picture != "":
            self.asked.see(one.picture, self.path, one.name)
        return number, caption_text_of(self.texts[number])

    def answer(self, block: list[tuple[int, str]]) -> list[Line]:
        """Draw, choose and save."""
        texts = [text for _, text in block]
        drawn = self.asked.draw(texts, self.count, [self.seed + self.count * number for number, _ in block])
        cosines = self.clip.cosines(texts, drawn) if self.clip is not None else [[0.0]] * len(block)
        lines = []
        for (number, text), several, row in zip(block, drawn, cosines, strict=True):
            best = max(range(len(several)), key=row.__getitem__)
            line: Line = {"caption": text, "picture": save_drawing(several[best], self.folder, number, text, "png")}
            if self.clip is not None:
                line |= {"clip": round(row[best], 4), "cut": self.clip.is_cut(text)}
            lines.append(line)
        return lines

    def numbers(self, lines: Sequence[Line]) -> dict[str, Any]:
        """Mean cosine and FID, and what could not be measured."""
        good = [line for line in lines if "picture" in line]
        cosines, notes = [line["clip"] for line in good if "clip" in line], []
        found: dict[str, Any] = {"clip": round(sum(cosines) / len(cosines), 4)} if cosines else {}
        if cut := sum(line.get("cut", False) for line in good):
            notes.append(f"{counted(cut, 'caption')} of {len(good):,} had more than the {self.clip.most} tokens that "  # type: ignore[union-attr]
                         "CLIP reads, and were cut for the choice.")
        if self.distance is not None:
            problem = self._no_distance(good)
            notes += [problem] if problem else []
            if not problem:
                found["fid"] = round(self.distance.between(
                    self._real(good), (open_image(self.folder / line["picture"]) for line in good)), 4)
        return {**found, "notes": notes} if notes else found

    def _no_distance(self, good: Sequence[Line]) -> str:
        known = {one.key: one.picture for one in self.texts}
        if bare := sum(known[line["id"]] == "" for line in good):
            return f"FID is not computed: {self.path} names no picture for {bare:,} of {counted(len(good), 'caption')}."
        if len(good) < 2:
            return "FID is not computed: it needs two drawings at least."
        return self.distance.missing() if self.distance is not None else ""

    def _real(self, good: Sequence[Line]) -> Iterator[Image.Image]:
        known = {one.key: one for one in self.texts}
        for line in good:
            one = known[line["id"]]
            yield self.asked.see(one.picture, self.path, one.name)


def caption_text_of(one: CaptionedPicture) -> str:
    """The first caption. Raises BadRecord: an empty one."""
    text = one.checked().captions[0].strip()
    if not text:
        raise BadRecord("empty text", f"{one.name}: its caption is empty.")
    return text


def save_drawing(image: Image.Image, folder: Path, number: int, text: str, kind: str = "jpg") -> str:
    """Save as NUMBER_CAPTION, whole or not at all; returns the file's name. Raises DataError: the disk refuses, which
    ends the run, since no caption is at fault."""
    path = folder / f"{number:06d}_{_file_stem(text)}.{kind}"
    with writing(path, DataError), replacing(path) as file:
        image.save(file, "JPEG" if kind == "jpg" else "PNG")
    return path.name
