"""Models and conversations of the chat page, without Gradio and torch.

A conversation is a list of turns, the user's first; a turn is texts and images in order. It is posted as by the
original front end: one text in the model's template with an `<image>` for each image, and the images or their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError, SeedError
from seed_multimodal.language import prompts as sentences
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.serving.client import Client

TOO_LONG = "Error: History exceeds maximum rounds, please clear history and restart."
Example = tuple[str, str]  # a text, and the name of a demo image or nothing


@dataclass(frozen=True)
class Kind:
    """The differences between models; `style`: of prompts, "roles" (USER: …), "questions" (Question: …), "llama2"
    ([INST] …) or "alone" (the last turn only); `can`: tabs next to the chat; `whole`: images are sent as they are, not
    squashed; `ratios`: shapes that it draws in, with its own settings rather than the sliders'."""

    style: str
    title: str
    can: tuple[str, ...] = ("draw", "edit", "codes")
    tasks: sentences.TaskPrompts = sentences.RELEASED_TASKS
    temperature: float = 1.0
    examples: tuple[Example, ...] = tuple(zip(sentences.DEMO_QUESTIONS, ("cat.jpg", "", "cat.jpg"), strict=True))
    whole: bool = False
    rounds: int = 3
    ratios: tuple[str, ...] = ()


def _seed_x(title: str, can: tuple[str, ...], *examples: Example, style: str = "llama2") -> Kind:
    described = (sentences.SEED_X_TASKS.describe, "fox_and_snowman.png")
    return Kind(style, title, can, sentences.SEED_X_TASKS, 0.0, (described, *examples), whole=True)


def _lavit(title: str, *examples: Example) -> Kind:
    tasks = sentences.TaskPrompts(draw="{caption}", draw_response="")
    return Kind("alone", title, ("draw",), tasks, examples=examples, whole=True, ratios=tuple(RATIOS))


_FIND = sentences.SEED_X_TASKS.detect_request("the snowman")
KINDS = {
    "nano": Kind("roles", "SEED nano", tasks=sentences.DEFAULT_TASKS, temperature=0.0, rounds=5, examples=(
        ("Please draw a noto dog left of a tree in a meadow.", ""), (sentences.DESCRIBE_PROMPT, "fox_and_snowman.png"),
        (f"What is on the left?{sentences.QA_SUFFIX}", "fox_and_snowman.png"), ("Put it at night.", "fox.png"))),
    "seed-llama-8b": Kind("roles", "SEED-LLaMA 8B"),
    "seed-llama-14b": Kind("llama2", "SEED-LLaMA 14B"),
    "seed-x": _seed_x("SEED-X", (), ("What is this?", "cat.jpg"), style="questions"),
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
    """An image of a conversation: its file ("" for one that could not be drawn), and its codes once they are known."""

    path: str
    codes: list[int] | None = None


@dataclass
class Turn:
    """One turn; `below`: notes, and images by their paths, that are shown under it and not sent."""

    parts: list[str | Shown]
    below: list[str | Shown] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(PLACEHOLDER if isinstance(part, Shown) else part for part in self.parts)

    @property
    def images(self) -> list[Shown]:
        return [part for part in self.parts if isinstance(part, Shown)]


def message(text: str, paths: Sequence[str]) -> Turn:
    """The user's input. Raises RequestError: empty, or contains the image placeholder."""
    if PLACEHOLDER in text:
        raise RequestError(f"Please do not type {PLACEHOLDER}: it stands for images.")
    if not paths and not text.strip(" ?.;!/"):
        raise RequestError("Write a message or choose an image first.")
    return Turn([*map(Shown, paths), *([text] if text else [])])


def check_rounds(style: str, turns: Sequence[Turn], rounds: int) -> None:
    """Raise `RequestError` for more than `rounds`."""
    if len(turns) > 2 * rounds and style != "alone":
        raise RequestError(TOO_LONG)


def prompt_text(style: str, texts: Sequence[str], system: str = "") -> str:
    """The prompt for turns, without `<s>`."""
    if style == "alone":
        return texts[-1]
    if style == "llama2":
        written = [said if number % 2 else f"[INST] {said} [/INST]" for number, said in enumerate(texts)]
        return "".join(f"{one}\n" for one in ([f"<<SYS>>\n{system}\n<</SYS>>\n"] if system else []) + written)
    user, assistant = ("Question", "Answer") if style == "questions" else ("USER", "ASSISTANT")
    written = [f"{(user, assistant)[number % 2]}: {said}\n" for number, said in enumerate(texts)]
    return (f"{system}\n" if system else "") + "".join(written) + f"{assistant}:"


def request(style: str, turns: Sequence[Turn], encode: Callable[[str], Any]) -> dict[str, Any]:
    """`text` and `images` to post: the codes of each image, or `encode(path)` where none are known yet."""
    asked = turns[-1:] if style == "alone" else turns
    images = [image for turn in asked for image in turn.images]
    return {"text": prompt_text(style, [turn.text for turn in asked]),
            "images": [encode(image.path) if image.codes is None else image.codes for image in images]}


def receive(style: str, turns: Sequence[Turn], answer: Mapping[str, Any], save: Callable[[str], str]) -> Turn:
    """The answer to `turns` as a turn; the codes of their images are filled in.

    Raises:
        RequestError: an inconsistent answer.
    """
    asked = [image for turn in (turns[-1:] if style == "alone" else turns) for image in turn.images]
    first, *pieces = answer["text"].split(PLACEHOLDER)
    ids, drawn = answer["images_ids"], answer["images"]
    if len(pieces) != len(drawn) or len(ids) != len(asked) + len(drawn):
        raise RequestError(f"The answer holds {len(pieces)} {PLACEHOLDER} for {len(drawn)} images, and codes of "
                           f"{len(ids)} images of {len(asked) + len(drawn)}.")
    for image, codes in zip(asked, ids, strict=False):
        image.codes = image.codes or codes
    parts: list[str | Shown] = [first]
    for image, codes, piece in zip(drawn, ids[len(asked):], pieces, strict=True):
        parts += [Shown(save(image) if image else "", codes), piece]
    return Turn([part for part in parts if part != ""], list(answer["error_msg"]))


@dataclass
class Model(Client):
    """A server and the properties of its model."""

    kind: Kind

    async def learn(self) -> str:
        """Query the server's model; returns a message if it does not respond."""
        try:
            async for answer in self.ask("/v1/models"):
                name = str(answer["data"][0]["id"]).rpartition("/")[2]
                self.kind = KINDS.get(name) or KINDS.get(f"seed-llama-{name}") or self.kind
        except SeedError as error:
            return str(error)
        return ""
