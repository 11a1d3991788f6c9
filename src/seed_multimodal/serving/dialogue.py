"""Models and conversations of the chat page, without Gradio and torch.

A conversation is a list of turns, the user's first; a turn is texts and images in order, sent as a message of
`/v1/chat/completions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language import prompts as sentences
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.lavit.ratios import RATIOS

TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
Example = tuple[str, str]  # a text, and the name of a demo image or nothing


@dataclass(frozen=True)
class Kind:
    """The differences between models; `can`: tabs next to the chat; `whole`: images are sent as they are, not squashed;
    `alone`: a message is read without those before it; `around`: what goes before and after it; `ratios`: shapes that
    it draws in, with its own settings rather than the sliders'."""

    title: str
    can: tuple[str, ...] = ("draw", "edit", "codes")
    tasks: sentences.TaskPrompts = sentences.RELEASED_TASKS
    temperature: float = 1.0
    examples: tuple[Example, ...] = tuple(zip(sentences.DEMO_QUESTIONS, ("cat.jpg", "", "cat.jpg"), strict=True))
    whole: bool = False
    alone: bool = False
    around: tuple[str, str] = ("", "")
    rounds: int = 3
    ratios: tuple[str, ...] = ()


def _seed_x(title: str, can: tuple[str, ...], *examples: Example, **more: Any) -> Kind:
    described = (sentences.SEED_X_TASKS.describe, "fox_and_snowman.png")
    return Kind(title, can, sentences.SEED_X_TASKS, 0.0, (described, *examples), whole=True, **more)


def _lavit(title: str, *examples: Example) -> Kind:
    tasks = sentences.TaskPrompts(draw="{caption}", draw_response="")
    return Kind(title, ("draw",), tasks, examples=examples, whole=True, alone=True, ratios=tuple(RATIOS))


_FIND = sentences.SEED_X_TASKS.detect_request("the snowman")
KINDS = {
    "nano": Kind("SEED nano", tasks=sentences.DEFAULT_TASKS, temperature=0.0, rounds=5, examples=(
        ("Please draw a noto dog left of a tree in a meadow.", ""), (sentences.DESCRIBE_PROMPT, "fox_and_snowman.png"),
        (f"What is on the left?{sentences.QA_SUFFIX}", "fox_and_snowman.png"), ("Put it at night.", "fox.png"))),
    "seed-llama-8b": Kind("SEED-LLaMA 8B"),
    "seed-llama-14b": Kind("SEED-LLaMA 14B"),
    "seed-x": _seed_x("SEED-X", (), ("What is this?", "cat.jpg"), alone=True, around=("Question: ", "\nAnswer:")),
    "seed-x-i": _seed_x("SEED-X-I", ("draw", "find"), (_FIND, "fox_and_snowman.png"),
                        ("Generate an image: a dog on the green grass", "")),
    "seed-x-edit": _seed_x("SEED-X-Edit", ("edit",), ("Make it under the sunset", "fox.png")),
    "nano-x": _seed_x("SEED nano-x", ("draw", "edit", "find"), (_FIND, "fox_and_snowman.png"),
                      ("Generate an image: a noto dog left of a tree", ""), ("Put it at night.", "fox.png")),
    "lavit": _lavit("LaVIT", ("What is in the picture?", "cat.jpg"), ("", "fox_and_snowman.png")),
    "nano-lavit": _lavit("SEED nano-lavit", ("What is the background?", "fox_and_snowman.png"), ("", "fox.png")),
}


def kind_of(model_type: str) -> Kind:
    """Look up a model type; raises `ConfigError` for an unknown one."""
    if model_type not in KINDS:
        raise ConfigError(f"Unknown model type {model_type!r}: use {', '.join(KINDS)}.")
    return KINDS[model_type]


@dataclass
class Shown:
    """An image of a conversation: its file, its codes if they are known, and whether a better one follows."""

    path: str
    codes: list[int] | None = None
    preview: bool = False


@dataclass
class Turn:
    """One turn; `below`: notes, and images by their paths, that are shown under it and not sent."""

    parts: list[str | Shown]
    below: list[str | Shown] = field(default_factory=list)

    @property
    def images(self) -> list[Shown]:
        return [part for part in self.parts if isinstance(part, Shown)]

    def add(self, change: Mapping[str, Any], save: Callable[[str], str]) -> None:
        """Add what a stream brings: text, images (which `save` stores) and notes."""
        for image in change.get("images", ()):
            self.parts = [part for part in self.parts if isinstance(part, str) or not part.preview]
            self.parts.append(Shown(save(image["image_url"]["url"]), image["codes"], image["preview"]))
        if text := change.get("content"):
            before = self.parts.pop() if self.parts and isinstance(self.parts[-1], str) else ""
            self.parts.append(f"{before}{text}")
        self.below += change.get("notes", ())

    def end(self) -> None:
        """Leave out previews of images that were never finished, and the blanks around texts."""
        parts = [part.strip() if isinstance(part, str) else part for part in self.parts]
        self.parts = [part for part in parts if (part if isinstance(part, str) else not part.preview)]


def message(text: str, paths: Sequence[str]) -> Turn:
    """The user's input. Raises RequestError: empty, or contains the image placeholder."""
    if PLACEHOLDER in text:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not paths and not text.strip(" ?.;!/"):
        raise RequestError("Write a message or choose an image first.")
    return Turn([*map(Shown, paths), *([text] if text else [])])


def messages(turns: Sequence[Turn], around: tuple[str, str], encode: Callable[[str], str]) -> list[dict[str, Any]]:
    """Turns as they are sent: the codes of each image, or `encode(path)` (base64) where none are known."""

    def part(one: str | Shown) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        if one.codes:
            return {"type": "image_url", "codes": one.codes}
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(one.path)}"}}

    roles = ("user", "assistant")
    said = [[around[0], *turn.parts, around[1]] if number % 2 == 0 else turn.parts for number, turn in enumerate(turns)]
    return [{"role": roles[number % 2], "content": [part(one) for one in parts if one]}
            for number, parts in enumerate(said)]


def check_rounds(turns: Sequence[Turn], rounds: int) -> None:
    """Raise `RequestError` for more than `rounds`."""
    if len(turns) > 2 * rounds:
        raise RequestError(TOO_LONG)
