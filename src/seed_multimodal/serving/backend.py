"""What the server needs of a model, and `SeedLlama` as that."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from seed_multimodal.images.encode import image_to_base64
from seed_multimodal.language.generation import GenerationSettings, room_for_answer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.serving.gate import Vanished
from seed_multimodal.serving.schema import GenerateRequest, Preview
from seed_multimodal.systems.chat import unknown_note

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.language.prompts import PromptTemplate
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.systems.seed_llama import SeedLlama


class Backend(Protocol):
    """Interface of a model for the engine; `SystemBackend` implements it with `SeedLlama`.

    A backend may also have `image_size` (the pixels a side that `transform` makes; larger pictures may reach it
    reduced), `check_prompt(length, request)`, which refuses a prompt of so many tokens before any picture is read, and
    `follow(prompt_ids, opening, request)`, which generates as `generate` does, gives each `Preview` on its way and
    returns `opening` (the ids at the prompt's end that belong to the answer) with the new ids, and `note(request)`, a
    sentence about the request that is reported beside the answer.
    `request.gone()` says whether the client has left.
    """

    tokenizer: MultimodalTokenizer

    def transform(self, image: Image.Image) -> Tensor:
        """One picture -> float32 [3, S, S]."""
        ...

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        """[B, 3, S, S] -> B rows of codes."""
        ...

    def generate(self, prompt_ids: list[int], request: GenerateRequest) -> list[int]:
        """Prompt ids -> the new ids only."""
        ...

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        """The codes of one picture -> that picture, drawn from the request's seed."""
        ...

    def spans(self, text: str) -> list[str]:
        """A stretch of prompt text cut where the model was tuned to read separately encoded spans."""
        ...

    def forced_words(self, request: GenerateRequest) -> str:
        """The words that come before a forced picture, `""` when the model was not tuned with any."""
        ...


class SystemBackend:
    """`SeedLlama` as a backend."""

    def __init__(self, system: SeedLlama) -> None:
        self.system = system
        self.tokenizer = system.tokenizer

    def transform(self, image: Image.Image) -> Tensor:
        return self.system.transform(image)

    def encode(self, pixels: Tensor) -> Sequence[Sequence[int]]:
        return self.system.pictures.encode_once(pixels).tolist()  # clients send earlier turns again

    def generate(self, prompt_ids: list[int], request: GenerateRequest) -> list[int]:
        return self.system.generate(prompt_ids, *self._settings(request))

    def follow(self, prompt_ids: list[int], opening: list[int],
               request: GenerateRequest) -> Generator[Preview, None, list[int]]:
        """As `generate`, with previews as `system.json` names them; returns the whole answer's ids."""
        settings, watch = self._settings(request)
        pictures, due = self.system.pictures, self.system.spec.previews if self.system.pictures.can_draw else ()
        number = -1
        with contextlib.closing(self.system.speaker.events(prompt_ids, settings, opening, due, watch)) as events:
            for event in events:
                number += event["type"] == "image_start"
                if event["type"] == "image_preview":
                    drawn = pictures.preview(event["codes"], request.seed)
                    yield Preview(number, len(event["codes"]), image_to_base64(drawn))
                elif event["type"] == "end":
                    return list(event["ids"])
        raise AssertionError("the last event is the end")

    def _settings(self, request: GenerateRequest) -> tuple[GenerationSettings, Callable[[], None]]:
        """How to generate, and what is called before each token."""
        needed = self.tokenizer.vocabulary.tokens_per_image + 1 if request.force_boi else 1
        settings = self.system.settings(
            num_beams=request.num_beams, seed=request.seed, max_new_tokens=max(request.max_new_tokens, needed),
            do_sample=request.do_sample, temperature=request.temperature, top_p=request.top_p)

        def watch() -> None:
            if request.gone():
                raise Vanished

        return settings, watch

    @property
    def image_size(self) -> int:
        """Pixels a side of what the vision tower reads."""
        return self.system.spec.image_size

    def check_prompt(self, length: int, request: GenerateRequest) -> None:
        """Refuse a prompt that leaves no room for an answer."""
        room_for_answer(length, self.system.llm)

    def decode(self, codes: list[int], request: GenerateRequest) -> Image.Image:
        return self.system.reconstruct(codes, seed=request.seed or 0)[0]

    def spans(self, text: str) -> list[str]:
        return cut_at_turns(text, self.system.template)

    def forced_words(self, request: GenerateRequest) -> str:
        tasks = self.system.tasks  # as `SeedLlama.chat` opens them
        return tasks.edit_response if PLACEHOLDER in request.text else tasks.draw_response

    def note(self, request: GenerateRequest) -> str:
        """About words that the model does not know, for `error_msg`."""
        template = self.system.template
        said = request.text.rpartition(template.user_marker)[2]
        ending = template.user_suffix.strip()  # the answer's role is no word of the message
        return unknown_note(self.system.spec.world, [said.partition(ending)[0] if ending else said])


def cut_at_turns(text: str, template: PromptTemplate) -> list[str]:
    """Prompt text as its turns were encoded in tuning: a question up to where the answer begins, an answer, and so on.

    One long string would put answers and the markers around them into one span, which the models never saw. Blanks
    that clients leave in front of an answer are dropped.
    """
    marker = template.separator + template.user_marker
    if not template.user_prefix:
        return [text]
    spans = re.split(f"(?<={re.escape(template.user_suffix)})|(?={re.escape(marker)})", text)
    return [spans[0], *(span if span.startswith(marker) else span.lstrip(" ") for span in spans[1:])]
