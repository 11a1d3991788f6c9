"""Requests about many images at once, for `SeedLlama` and `SeedX`; `Lavit` has methods of the same names.

    captions = system.describe_all(images, batch_size=32)
    answers = system.ask_all(images, questions)
    drawings = system.draw_all(["a red fox", "a blue fish"], number=4)

Each result is what the single method gives; neighbours in a batch change it by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from seed_multimodal.errors import GenerationError
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.systems.chat import Answer, Content, as_text, read_messages
from seed_multimodal.systems.picture_half import one_seed_each
from seed_multimodal.systems.speaker import AnswerReader

BATCH = 16


@dataclass
class Written:
    """An answer before its images are drawn.

    Attributes:
        images: each whole image as the model wrote it: codes, or features [N, W].
        source: the image that an edit starts from, for de-tokenizers that read one.
    """

    answer: Answer
    images: Sequence[Any]
    source: Image.Image | None = None


class BatchMethods:
    """Base of `TalkingSystem`. A subclass says how a batch is generated (`answer_batch`) and drawn (`draw_written`)."""

    tasks: Any
    pictures: Any
    speaker: Any
    tokenizer: Any
    _shown: Any
    _take_decode: Any
    _forced: Any
    settings: Any

    def answer_batch(self, contents: Sequence[Content], task: str, settings: GenerationSettings,
                     opening: Sequence[int] = (), seeds: Sequence[int] | None = None) -> list[Written]:
        """One batch of single messages; `opening`: ids that begin every answer."""
        raise NotImplementedError

    def draw_written(self, written: Sequence[Written], seeds: Sequence[int], batch_size: int,
                     decode: dict[str, Any]) -> list[Image.Image]:
        """The first image of each answer."""
        raise NotImplementedError

    def describe_all(self, images: Sequence[Any], prompts: str | Sequence[str] | None = None, *,
                     batch_size: int = BATCH, **options: Any) -> list[str]:
        """Captions, each as `describe` gives it; `prompts`: one for all, or one each."""
        texts = _each(self.tasks.describe if prompts is None else prompts, images)
        return [self._words(one) for one in self._answer_all(images, texts, "ask", batch_size, options)]

    def ask_all(self, images: Sequence[Any], questions: str | Sequence[str], *, short: bool = True,
                batch_size: int = BATCH, **options: Any) -> list[str]:
        """Answers, each as `ask` gives it; `questions`: one for all, or one each."""
        asked = [self.tasks.question(one) if short else one for one in _each(questions, images)]
        return [self._words(one) for one in self._answer_all(images, asked, "ask", batch_size, options)]

    def draw_all(self, texts: Sequence[str], *, seed: Any = 0, number: int = 1, verbatim: bool = False,
                 batch_size: int = BATCH, **options: Any) -> list[Image.Image]:
        """`number` drawings of each text, one after the other, as `draw` gives them with `seed`, `seed` + 1, …

        Args:
            seed: one for all texts, or one each.

        Raises:
            GenerationError: an answer without a whole image.
        """
        contents = [[self.drawing_request(text, verbatim)] for text in texts]
        return self._draw_all(contents, "draw", seed, number, batch_size, options)

    def edit_all(self, images: Sequence[Any], instructions: str | Sequence[str], *, seed: Any = 0,
                 batch_size: int = BATCH, **options: Any) -> list[Image.Image]:
        """Edits, each as `edit` gives it; `instructions` and `seed`: one for all, or one each."""
        contents = [[*self._shown(image), text] for image, text in zip(images, _each(instructions, images),
                                                                       strict=True)]
        return self._draw_all(contents, "edit", seed, 1, batch_size, options)

    def write_all(self, contents: Sequence[Sequence[Any]], task: str = "draw", *, seeds: Sequence[int] | None = None,
                  batch_size: int = BATCH, **options: Any) -> list[Written]:
        """Answers to messages (texts, images) that ask for one image, not yet drawn; each should hold one.

        Args:
            task: "draw" or "edit". seeds: of sampling, one each; None: `seed` of the settings.
        """
        words, response = self.free_words(task), getattr(self.tasks, f"{task}_response")
        opening = self.tokenizer.encode_parts([response]) if response else []
        room = self.tokenizer.vocabulary.tokens_per_image + 1
        forced = replace(self._forced(self.settings(**options), options), max_new_tokens=room)
        free = replace(forced, force_image=False, max_new_tokens=room + words)
        written: dict[int, Written] = {}
        for settings, start in ((free, ()), (forced, opening))[not words:]:
            left = [row for row in range(len(contents)) if row not in written or len(written[row].images) != 1]
            for rows in _batches(left, batch_size):
                written |= zip(rows, self.answer_batch(
                    [_message(contents[row]) for row in rows], task, settings, start,
                    None if seeds is None else [seeds[row] for row in rows]), strict=True)
        return [written[row] for row in range(len(contents))]

    def drawing_request(self, text: str, verbatim: bool) -> str:
        """The message that asks for an image of `text`. Raises RequestError: an empty text."""
        text = as_text(text, "The text to draw")
        return text if verbatim else str(self.tasks.draw_request(text))

    def free_words(self, task: str) -> int:
        """Tokens in which the model may first say something; only where no image follows, it is forced."""
        return int(getattr(self.tasks, f"{task}_words"))

    # ---- inside

    def _words(self, answer: Answer) -> str:
        """The text of an answer for people."""
        return answer.text

    def _answer_all(self, images: Sequence[Any], texts: Sequence[str], task: str, batch_size: int,
                    options: dict[str, Any]) -> list[Answer]:
        settings, answers = self.settings(**options), list[Answer]()
        for rows in _batches(range(len(images)), batch_size):
            contents = [_message([*self._shown(images[row]), texts[row]]) for row in rows]
            answers += [one.answer for one in self.answer_batch(contents, task, settings)]
        return answers

    def _draw_all(self, contents: Sequence[Sequence[Any]], task: str, seed: Any, number: int, batch_size: int,
                  options: dict[str, Any]) -> list[Image.Image]:
        decode = self._take_decode(options)
        self.pictures.check_drawing(**decode)  # a missing de-tokenizer is reported before generation
        first = one_seed_each(seed, len(contents))
        seeds = [(one + place) % 2**63 for one in first for place in range(number)]
        if self.settings(**options).samples:
            written = self.write_all([one for one in contents for _ in range(number)], task, seeds=seeds,
                                     batch_size=batch_size, **options)
        else:  # all drawings of a text have the same codes or features
            once = self.write_all(contents, task, batch_size=batch_size, **options)
            written = [one for one in once for _ in range(number)]
        broken = next((one.answer for one in written if len(one.images) != 1), None)
        if broken is not None:
            raise GenerationError("The model's answer holds no whole picture"
                                  + (f": {broken.problems[0]}" if broken.problems else "."))
        return self.draw_written(written, seeds, batch_size, decode) if written else []

    def _read_answer(self, ids: Sequence[int]) -> Answer:
        """An answer up to its end or the marker of a user's turn."""
        ids = AnswerReader(self.tokenizer, self.speaker.marker).read_all(ids)
        return Answer(split_answer(ids, self.tokenizer), ids, answer_after=self.tasks.answer_after)


def written_images(answer: Answer) -> list[ImagePart]:
    """The whole images of an answer."""
    return [part for part in answer.parts if isinstance(part, ImagePart)]


def _message(content: Sequence[Any]) -> Content:
    return read_messages([{"role": "user", "content": list(content)}])[0]


def _each(texts: str | Sequence[str], images: Sequence[Any]) -> Sequence[str]:
    """One text for each image."""
    return [texts] * len(images) if isinstance(texts, str) else texts


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start:start + size]
