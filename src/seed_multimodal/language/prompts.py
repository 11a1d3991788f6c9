"""Prompt templates: turns of text and images → segments for `TextTokenizer.encode_parts`.

    vicuna (8B, nano)   USER: {user}\\nASSISTANT:{answer}\\nUSER: {user}\\nASSISTANT:…
    llama2 (14B)        [INST] {user} [/INST]\\n{answer}\\n[INST] {user} [/INST]\\n…
    plain (pretrained)  {concatenated content}
    chat                the chat template of a hub tokenizer

The prompt starts with `<s>` (`add_bos=True`); there is no end token between turns. An answer is a
separate segment, as in the instruction-tuning data: "ASSISTANT:" followed by a segment starting
with the dummy blank. So the ids of a shorter dialogue are a prefix of a longer one's, and training
and inference share this function.

`TaskPrompts`: the request sentences of the tasks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.hub_tokenizer import has_chat_template
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER

T = TypeVar("T")
CHAT = "chat"  # the chat template of the tokenizer
# "user" or "assistant", and texts and images (as codes) in order
Turn = tuple[str, str | Sequence[Part]]


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a user's turn, and around a system message before all turns."""

    name: str
    user_prefix: str
    user_suffix: str
    separator: str
    system_prefix: str = ""
    system_suffix: str = ""

    @property
    def turn_marker(self) -> str:
        """What opens a user's turn after an answer."""
        return self.separator + self.user_prefix.rstrip()

    @property
    def has_end_token(self) -> bool:
        """Whether answers end with a token, which the next turn begins with."""
        return False

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end an answer: the opening of the next turn.

        The original models saw no end token between turns, so they continue with a question.
        """
        return (self.turn_marker,) if self.turn_marker and not self.has_end_token else ()

    def render(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """Segments of a dialogue; after a user turn it ends where the answer starts."""
        return [part for _, parts in self.render_turns(turns, system) for part in parts]

    def render_turns(self, turns: Sequence[Turn], system: str = "") -> list[tuple[str, list[Part]]]:
        """Role and segments of each turn: what precedes an answer is the user's."""
        rendered: list[tuple[str, list[Part]]] = []
        before = self.system_text(system) if system else ""
        for role, content in turns:
            parts = [content] if isinstance(content, str) else content
            if role == "user":
                parts = [before + self.user_prefix, *parts, self.user_suffix]
                before = self.separator
            rendered.append((role, merge_text(parts)))
        return rendered

    def system_text(self, system: str) -> str:
        """What precedes the first user's turn, if there is a system message."""
        return f"{self.system_prefix}{system}{self.system_suffix}"


def merge_text(parts: Sequence[T]) -> list[T]:
    """Join adjacent texts and drop empty ones."""
    merged: list[Any] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] = merged[-1] + part
        elif not isinstance(part, str) or part:
            merged.append(part)
    return merged


def interleave(text: str, images: Sequence[T]) -> list[str | T]:
    """Texts and images in order; images replace `<image>`, or come first in a text without it.

    Raises RequestError: another number of `<image>` than images.
    """
    first, *texts = text.split(PLACEHOLDER)
    if not texts:
        return [*images, text] if text else [*images]
    if len(texts) != len(images):
        raise RequestError(
            f"The text holds {len(texts)} {PLACEHOLDER} placeholders for {len(images)} images."
        )
    parts: list[str | T] = [first]
    for image, text_after in zip(images, texts, strict=True):
        parts += [image, text_after]
    return [part for part in parts if part != ""]


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The chat template of a tokenizer: it writes a mark for each content, which replaces it.

    So the template decides where system messages and empty blocks of thoughts stand, and names of
    special tokens in contents stay text; images stay where their message has them. An answer ends
    with a token, which the next turn begins with. The fields of the base class are those of a
    conversation of texts.

    answer_start: what the template writes after the last question.
    takes_texts: whether a content may be a text; else it is a list of one.
    """

    tokenizer: TextTokenizer = field(kw_only=True)
    answer_start: str = field(kw_only=True)
    takes_texts: bool = field(kw_only=True)

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> ChatTemplate:
        """Probe a tokenizer's template. Raises ConfigError: none, or it does not keep contents."""
        # 1. The form of contents.
        try:
            text = tokenizer.render_chat([_marked_message("user", 0, takes_texts=True)])
        except ConfigError:
            text = ""
        takes_texts = _MARK.search(text) is not None

        # 2. What stands around the contents of a conversation; `split` also returns three groups.
        roles = ("user", "assistant", "user")
        text = tokenizer.render_chat(
            [_marked_message(role, index, takes_texts) for index, role in enumerate(roles)]
        )
        if [int(match[2]) for match in _MARK.finditer(text)] != [0, 1, 2]:
            raise ConfigError("The chat template drops, repeats or reorders messages.")
        start, user_suffix, between, answer_start = _MARK.split(text)[::4]

        # 3. A user's prefix is what both questions have before them.
        user_prefix = os.path.commonprefix((start[::-1], between[::-1]))[::-1]
        return cls(
            CHAT,
            user_prefix,
            user_suffix,
            between.removesuffix(user_prefix),
            tokenizer=tokenizer,
            answer_start=answer_start,
            takes_texts=takes_texts,
        )

    @property
    def has_end_token(self) -> bool:
        _, names = self.tokenizer.split(self.separator + self.user_prefix)
        return bool(names) and self.tokenizer.token_id(names[0]) in self.tokenizer.eos_token_ids

    def render_turns(self, turns: Sequence[Turn], system: str = "") -> list[tuple[str, list[Part]]]:
        """Raises RequestError: the template refuses the conversation."""
        # 1. The template's text, with a mark for each content.
        contents = [("system", system), *turns] if system else [*turns]
        messages = [
            _marked_message(role, index, self.takes_texts)
            for index, (role, _) in enumerate(contents)
        ]
        try:
            text = self.tokenizer.render_chat(messages)
        except ConfigError as error:
            raise RequestError(str(error)) from error
        indices = [int(match[2]) for match in _MARK.finditer(text)]
        if system and 0 not in indices and turns[-1][0] == "assistant":
            # Mistral's has the system message in the last question, if no answer follows.
            return [*self.render_turns(turns[:-1], system), self.render_turns(turns)[-1]]
        turn_indices = [index for index in indices if contents[index][0] != "system"]
        if sorted(indices) != [*range(len(contents))] or turn_indices != sorted(turn_indices):
            raise RequestError("The chat template drops, repeats or reorders messages.")

        # 2. What precedes an answer is the user's turn. A blank that the template writes only
        #    before given answers is generated with the answer.
        rendered: list[tuple[str, list[Part]]] = []
        prompt: list[Part] = []
        position = 0
        for match in _MARK.finditer(text):
            before = text[position : match.start()]
            position = match.end()
            role, content = contents[int(match[2])]
            parts = _stripped(content, left=not match[1], right=not match[3])
            if role != "assistant":
                prompt += [*self.tokenizer.control_parts(before), *parts]
            else:
                length = len(before)
                if before.startswith(self.answer_start):
                    length = len(self.answer_start)
                rendered.append(("user", [*prompt, *self.tokenizer.control_parts(before[:length])]))
                rendered.append((role, [*self.tokenizer.control_parts(before[length:]), *parts]))
                prompt = []
        if turns[-1][0] == "user":
            rendered.append(("user", [*prompt, *self.tokenizer.control_parts(text[position:])]))

        # 3. `add_bos` puts the start before the template's text.
        first = rendered[0][1]
        if first[:2] == ["", tuple(self.tokenizer.start_ids)]:
            del first[:2]
        return [(role, merge_text(parts)) for role, parts in rendered]


# A mark is the number of a content. The white space around it is lost where a template strips
# contents.
_MARK = re.compile("(\x0b?)\ue000([0-9]+)\ue000(\x0b?)")


def _marked_message(role: str, index: int, takes_texts: bool) -> dict[str, object]:
    """A message whose content is a mark."""
    mark = f"\x0b\ue000{index}\ue000\x0b"
    return {"role": role, "content": mark if takes_texts else [{"type": "text", "text": mark}]}


def _stripped(content: str | Sequence[Part], *, left: bool, right: bool) -> list[Part]:
    """A content without the white space at its ends."""
    parts = merge_text([content] if isinstance(content, str) else content)
    if left and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if right and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate("vicuna", "USER: ", "\nASSISTANT:", "\n", system_suffix="\n"),
        PromptTemplate("llama2", "[INST] ", " [/INST]\n", "\n", "<<SYS>>\n", "\n<</SYS>>\n\n"),
        PromptTemplate("plain", "", "", ""),
    )
}
TUNED_TEMPLATES = ("vicuna", "llama2", CHAT)  # of instruction-tuned models


def template_for(hidden_size: int | None, tokenizer: Path | None = None) -> str:
    """The chat template of a hub tokenizer's folder; else LLaMA-2's template for the 14B (built on
    LLaMA-2-chat 13B), Vicuna's for all others."""
    if tokenizer is not None and has_chat_template(tokenizer):
        return CHAT
    return "llama2" if hidden_size == 5120 else "vicuna"


def get_template(name: str, tokenizer: TextTokenizer | None = None) -> PromptTemplate:
    """A template by its name, or "chat": the tokenizer's. Raises ConfigError: there is none."""
    if name == CHAT and tokenizer is not None:
        return ChatTemplate.of(tokenizer)
    if name not in TEMPLATES:
        names = ", ".join((*TEMPLATES, CHAT))
        raise ConfigError(f"Unknown prompt template {name!r}: use {names}.")
    return TEMPLATES[name]


# ---- request sentences: of training data and of systems (the first two: the original ones)

DESCRIBE_PROMPT = "Please provide an accurate and concise description of the given image."
QA_SUFFIX = " Please provide an accurate answer consisting of only one word or phrase."
DESCRIBE_VIDEO_PROMPT = "Please provide an accurate and concise description of the given video."
DRAW_PROMPT = "Please draw {caption}."
DRAW_RESPONSE = "Here is the picture."
# Also the response to a request for an image in a conversation that has one already.
EDIT_RESPONSE = "Here it is."

_UNFINISHED_VERDICT = re.compile(r": (?:yes|no)\b")
# Requests of the original inference scripts: about an image, for an image, for a change of one.
DEMO_QUESTIONS = (
    "What is this animal?",
    "Can you generate an image of a dog on the green grass?",
    "Can you make the cat wear sunglasses?",
)


@dataclass(frozen=True)
class TaskPrompts:
    """The sentences of one system; a `tasks` object in `system.json` overrides single ones.

    Some systems write a verdict before the answer: "at the top a shark: no, at the bottom a flame:
    yes - at the bottom".

    draw_response, edit_response: open a forced answer, before `<img>`.
    draw_words, edit_words: tokens in which the model may describe the image, before it is forced.
    answer_after: the end of a verdict (" - "), which callers do not see; empty: there are none.
    """

    describe: str = DESCRIBE_PROMPT
    qa_prefix: str = ""
    qa_suffix: str = QA_SUFFIX
    draw: str = DRAW_PROMPT
    draw_response: str = DRAW_RESPONSE
    edit_response: str = EDIT_RESPONSE
    detect: str = "{phrase}"
    draw_words: int = 0
    edit_words: int = 0
    answer_after: str = ""

    def __post_init__(self) -> None:
        for key, placeholder in (("draw", "{caption}"), ("detect", "{phrase}")):
            if placeholder not in getattr(self, key):
                raise ConfigError(
                    f"tasks: {key} must hold {placeholder}, not {getattr(self, key)!r}."
                )

    def draw_request(self, caption: str) -> str:
        """The request for an image of `caption`, without its trailing dots and blanks."""
        return self.draw.replace("{caption}", caption.strip().rstrip(".").strip())

    def detect_request(self, phrase: str) -> str:
        """The request to locate `phrase`, unless that ends like a sentence: it is a request."""
        phrase = phrase.strip()
        if phrase.endswith((".", "?", "!")):
            return phrase
        return self.detect.replace("{phrase}", phrase)

    def question(self, question: str) -> str:
        """`question` with the request for one word, unless it already ends in it."""
        question = question.strip()
        if question.endswith(self.qa_suffix.strip()):
            return question
        return self.qa_prefix + question + self.qa_suffix


def split_verdict(text: str, answer_after: str) -> tuple[str, str]:
    """The verdict that a text begins with (see `TaskPrompts`), or nothing, and what follows.

    A text that broke off behind a "yes" or "no" of a verdict is all of it.
    """
    verdict, _, answer = text.partition(answer_after) if answer_after else ("", "", "")
    if not answer and answer_after and _UNFINISHED_VERDICT.search(text):
        return text, ""
    return (verdict, answer) if answer else ("", text)


DEFAULT_TASKS = TaskPrompts()
# Requests of SEED-X's scripts. Its tuned models announce the image in a sentence; the scripts gave
# them 120 tokens, 66 of which are the image's.
SEED_X_TASKS = TaskPrompts(
    describe="Describe this image briefly.",
    qa_suffix="",
    draw="Generate an image: {caption}",
    draw_response="",
    edit_response="",
    detect="Where is {phrase}? Show me the location.",
    draw_words=54,
    edit_words=54,
)
