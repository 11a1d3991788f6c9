"""`Task`: what a method, a route or a class asks of a system, with its settings and its notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.messages import Message
from seed_multimodal.pipelines.images import Options

TaskKind = Literal["describe", "ask", "detect", "draw", "edit", "chat"]
DRAWING_KINDS = ("draw", "edit")


class Notes(list[str]):
    """Sentences for the user about one request, in order and without repetition.

    preface: with which the answer's text begins, since it is a guess.
    """

    preface = ""

    def add(self, *sentences: str) -> None:
        """Add those that are neither empty nor there."""
        for sentence in sentences:
            if sentence and sentence not in self:
                self.append(sentence)


@dataclass(frozen=True)
class Drawing:
    """How the images of an answer are drawn.

    seeds: each image of the answer is drawn with each of them.
    settings: of the codec's `draw`, equal for all tasks of a run.
    previews: numbers of codes after which an unfinished image is shown.
    reads_back: the system describes what it drew, and compares it with the request.
    """

    seeds: Sequence[int]
    settings: Options
    previews: Sequence[int] = ()
    reads_back: bool = False


@dataclass(eq=False)
class Task:
    """One request, for `pipelines.run`.

    request: a conversation, of which a family builds a prompt; or a prompt that was built before.
    opening: text with which the answer begins.
    first: settings of an answer before this one, in which the model may say what its image will
    show: an image is forced where that has none, or several.
    negative: what a drawing shall not show.
    drawing: None: the answer's images are not drawn.
    notes: the only place of sentences about the request; tasks of one request share it.
    """

    kind: TaskKind
    request: Sequence[Message] | Prompt
    generation: GenerationSettings
    opening: str = ""
    first: GenerationSettings | None = None
    negative: str = ""
    drawing: Drawing | None = None
    notes: Notes = field(default_factory=Notes)
