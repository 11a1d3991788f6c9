"""What the released evaluation scripts do to each sample, for sets of any length: answer, describe, draw.

    work, score = question_work(system, Questions("v2_OpenEnded_….json"), images, annotations, settings)
    work_off(work, folder, batch=32)

Each function gives the `Work` of `answer_folder` and a function that turns its lines into a results file in the
benchmark's own format and into numbers. Prompts are `chat` (the tuned models' own) or `plain` (the pretrained model's,
as in the released scripts):

    question   plain  <s>[picture]Question: …\\nAnswer:       chat  the user's turn: picture, question, one-word request
    caption    plain  <s>[picture]PROMPT                     chat  the user's turn: picture, request to describe
    drawing    plain  <s>caption<img>                        chat  the user's turn: request to draw
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from seed_multimodal.data.formats.benchmark_files import Annotations, Question, Questions
from seed_multimodal.data.formats.caption_files import CaptionedPicture
from seed_multimodal.data.formats.pictures import HeldPicture, find_picture
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.disk import sha256_of, writing
from seed_multimodal.errors import GenerationError, ImageError
from seed_multimodal.evaluation.answer_folder import Line, Work
from seed_multimodal.evaluation.batched import BatchedSystem
from seed_multimodal.evaluation.vqa_accuracy import vqa_accuracy
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.caption_scores import caption_scores
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.prompts import Turn

PROMPTS = ("chat", "plain")
PLAIN_QUESTION = "Question: {}\nAnswer:"
# Of the released caption-to-picture script.
DRAWING = GenerationSettings(temperature=0.0, num_beams=4, max_new_tokens=120, do_sample=False)
DRAWING_GUIDANCE = 5.0
# Of the released captioning evaluation (its temperature 0.7 has no effect without sampling).
CAPTIONING = GenerationSettings(temperature=0.7, num_beams=5, max_new_tokens=120, do_sample=False)
# Ours: the released script asked a single question, see `PROBE`.
ANSWERING = GenerationSettings(temperature=0.0, num_beams=1, max_new_tokens=16, do_sample=False)
PROBE = GenerationSettings(temperature=1.0, num_beams=5, max_new_tokens=512, top_p=0.5, do_sample=True, seed=42)

Score = Callable[[Sequence[Line]], tuple[Any, dict[str, Any]]]
T = TypeVar("T")


@dataclass
class Benchmark:
    """A system as it is asked.

    Attributes:
        prompts: `chat` or `plain`. settings: of generation.
        images: folder of the pictures (None: beside the file that names them, then the current folder).
    """

    system: BatchedSystem
    prompts: str
    settings: GenerationSettings
    images: Path | None = None

    def pixels(self, picture: int | str | HeldPicture, beside: Path, where: str) -> Tensor:
        """A picture as the tokenizer takes it, [3, S, S]. Raises ImageError."""
        codec = self.system.inner.pictures
        found = find_picture(picture, self.images, beside, where)
        return codec.transform(codec.open(found, where if isinstance(found, bytes) else None))

    def say(self, pixels: Sequence[Tensor], chat: Sequence[str], plain: Sequence[str]) -> list[str]:
        """The answers to a request about each picture. A plain answer ends with its line, since the pretrained model
        goes on with another question."""
        codes = self.system.inner.pictures.encode_once(torch.stack(list(pixels))).tolist()
        texts = chat if self.prompts == "chat" else plain
        answers = self.system.generate([self.prompt(row, text) for row, text in zip(codes, texts, strict=True)],
                                       self.settings)
        said = [self.system.text(ids).strip() for ids in answers]
        return said if self.prompts == "chat" else [text.partition("\n")[0].strip() for text in said]

    def prompt(self, *parts: Any) -> list[int]:
        """Ids of a request."""
        inner = self.system.inner
        if self.prompts == "chat":
            return inner.prompt_ids([Turn("user", tuple(part for part in parts if part))])
        return inner.tokenizer.encode_parts([part for part in parts if part], add_bos=True)

    def facts(self) -> dict[str, Any]:
        """What answers depend on."""
        inner = self.system.inner
        bits = next((bits for bits in ("8bit", "4bit") if getattr(inner.llm, f"is_loaded_in_{bits}", False)), None)
        return {"prompts": self.prompts, "template": inner.template.name, "generation": asdict(self.settings),
                "model": inner.spec.name, "llm": str(inner.spec.llm), "transform": repr(inner.pictures.transform),
                "dtype": str(inner.llm.dtype).removeprefix("torch."), "quantization": bits}


@dataclass
class PictureSamples(Generic[T]):
    """Items with pictures by number; neighbours with one picture (as in VQA) have it decoded once."""

    keys: Sequence[int | str]
    item: Callable[[int], T]
    pixels: Callable[[T], Tensor]
    picture: Callable[[T], int | str | HeldPicture]
    _last: tuple[int | str | HeldPicture | None, Tensor | None] = (None, None)

    def read(self, number: int) -> tuple[T, Tensor]:
        """The item and its picture [3, S, S]. Raises as `answer_folder.Samples`."""
        item = self.item(number)
        name, pixels = self._last
        if pixels is None or name != self.picture(item):
            pixels = self.pixels(item)
            self._last = (self.picture(item), pixels)
        return item, pixels


def question_work(benchmark: Benchmark, questions: Questions, annotations: Annotations | None, limit: int | None
                  ) -> tuple[Work[tuple[Question, Tensor]], Score]:
    """Answers to a file of questions; results as the official server takes them, accuracy in percent if annotated.

    A question without an answer counts as wrong; an item that is no question does not count.
    """
    path = questions.items.path

    def answer(block: list[tuple[Question, Tensor]]) -> list[Line]:
        asked = [question.text for question, _ in block]
        requests = [benchmark.system.inner.tasks.question(one) for one in asked]
        said = benchmark.say([pixels for _, pixels in block], requests, [PLAIN_QUESTION.format(one) for one in asked])
        return [{"answer": text.removesuffix(".")} for text in said]  # the tuned models end answers in a full stop

    def score(lines: Sequence[Line]) -> tuple[Any, dict[str, Any]]:
        asked = [line for line in lines if line["id"] not in questions.problems]
        results = [{"question_id": line["id"], "answer": line.get("answer", "")} for line in asked]
        if annotations is None:
            return results, {}
        sums: dict[str, dict[str, list[float]]] = {"per_answer_type": {}, "per_question_type": {}}
        total = 0.0
        for line in asked:
            truth = annotations.read(line["id"])
            value = 100 * vqa_accuracy(line["answer"], truth.answers) if "answer" in line else 0.0
            total += value
            for name, kind in (("per_answer_type", truth.answer_type), ("per_question_type", truth.question_type)):
                sums[name].setdefault(kind, []).append(value)
        means = {name: {kind: round(sum(values) / len(values), 2) for kind, values in kinds.items() if kind}
                 for name, kinds in sums.items()}
        return results, {"accuracy": round(total / max(1, len(asked)), 2), **means}

    samples = PictureSamples(questions.keys, questions.read, lambda one: benchmark.pixels(one.picture, path, one.name),
                             lambda one: one.picture)
    settings = {"task": "vqa", "questions": _identity(path), **benchmark.facts()}
    return Work(samples, answer, settings, limit), score


def caption_work(benchmark: Benchmark, path: Path, pictures: Sequence[CaptionedPicture], prompt: str,
                 limit: int | None) -> tuple[Work[tuple[CaptionedPicture, Tensor]], Score]:
    """Captions of pictures; results as COCO's server takes them, scores against the file's captions.

    Args:
        prompt: first words of a plain caption.
    """
    def answer(block: list[tuple[CaptionedPicture, Tensor]]) -> list[Line]:
        said = benchmark.say([pixels for _, pixels in block], [benchmark.system.inner.tasks.describe] * len(block),
                             [prompt] * len(block))
        return [{"caption": text} for text in said]

    def score(lines: Sequence[Line]) -> tuple[Any, dict[str, Any]]:
        references = {one.key: one.captions for one in pictures if not one.problem}
        captions = {line["id"]: line.get("caption", "") for line in lines if line["id"] in references}
        return ([{"image_id": key, "caption": text} for key, text in captions.items()],
                {name: round(value, 4) for name, value in caption_scores(captions, references).items()})

    samples = PictureSamples([one.key for one in pictures], lambda number: pictures[number].checked(),
                             lambda one: benchmark.pixels(one.picture, path, one.name), lambda one: one.picture)
    settings = {"task": "caption", "captions": _identity(path), "caption_prompt": prompt, **benchmark.facts()}
    return Work(samples, answer, settings, limit), score


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
        self.settings = {"task": "drawing", "captions": None if path is None else _identity(path), "seed": seed,
                         "decode": self.decode, **benchmark.facts()}

    def work(self, limit: int | None) -> tuple[Work[tuple[int, str]], Score]:
        """As `question_work`; nothing is scored."""
        return Work(self, self.answer, self.settings, limit), _drawn

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


def _drawn(lines: Sequence[Line]) -> tuple[Any, dict[str, Any]]:
    return [{key: line[key] for key in ("id", "caption", "picture") if key in line} for line in lines], {}


def _file_stem(text: str) -> str:
    """A caption as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text).strip("_")[:60] or "picture"


def _identity(path: Path) -> dict[str, Any]:
    """What tells a file from another version of it."""
    return {"file": str(path), "sha256": sha256_of(path)}
