"""Prompt templates: turns of text and images → segments for `MultimodalTokenizer.encode_parts`.

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

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import Ids

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

    # Before the first user's turn without a system message.
    default_opening: str = ""

    @property
    def turn_marker(self) -> str:
        """What opens a user's turn after an answer."""
        return self.separator + self.user_prefix.rstrip()

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end an answer: the opening of the next turn.

        The original models saw no end token between turns, so they continue with a question.
        """
        return (self.turn_marker,) if self.turn_marker else ()

    def render(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """Segments of a dialogue; after a user turn it ends where the answer starts."""
        segments: list[Part] = []
        opening = self.opening(system)
        for role, content in turns:
            segments += self.render_turn(role, content, opening)
            if role == "user":
                opening = self.separator
        return segments

    def opening(self, system: str = "") -> str:
        """What precedes the first user's turn."""
        if not system:
            return self.default_opening
        return f"{self.system_prefix}{system}{self.system_suffix}"

    def render_turn(self, role: str, content: str | Sequence[Part], opening: str) -> list[Part]:
        """Segments of one turn; `opening`: prefix of a user's."""
        parts = [content] if isinstance(content, str) else content
        if role == "user":
            parts = [opening + self.user_prefix, *parts, self.user_suffix]
        return merge_text(parts)


def merge_text(parts: Sequence[Part]) -> list[Part]:
    """Join adjacent texts and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] = merged[-1] + part
        elif not isinstance(part, str) or part:
            merged.append(part)
    return merged


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The chat template of a tokenizer, whose texts name special tokens.

    An answer ends with a token, which the next turn begins with.
    """

    tokenizer: TextTokenizer = field(kw_only=True)

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> ChatTemplate:
        """The texts around the contents of probes. Raises ConfigError: none, or irregular."""
        # 1. A conversation with and without a system message, at its second question.
        turns = [
            {"role": "user", "content": _PROBES[0]},
            {"role": "assistant", "content": _PROBES[1]},
            {"role": "user", "content": _PROBES[2]},
        ]
        plain = tokenizer.render_chat(turns)
        instructed = tokenizer.render_chat([{"role": "system", "content": _SYSTEM}, *turns])
        pieces = _PROBE.split(plain)
        system_pieces = _PROBE.split(instructed)
        if len(pieces) != 4 or len(system_pieces) != 5:
            raise ConfigError("The chat template drops, repeats or reorders messages.")

        # 2. What opens both questions is a user's prefix, but for the token that ends an answer.
        start, user_suffix, between, _ = pieces
        system_prefix, system_suffix, *_ = system_pieces
        texts, names = tokenizer.split(between)
        after_end = between[len(texts[0]) + len(names[0]) :] if names else between
        reverse = (start[::-1], after_end[::-1], system_suffix[::-1])
        user_prefix = os.path.commonprefix(reverse)[::-1]
        # It begins at a special token, where there is one.
        texts, names = tokenizer.split(user_prefix)
        if names:
            user_prefix = user_prefix[len(texts[0]) :]
        cut = -len(user_prefix) or None
        template = cls(
            "chat",
            user_prefix,
            user_suffix,
            between[:cut],
            _without_start(system_prefix, tokenizer),
            system_suffix[:cut],
            _without_start(start[:cut], tokenizer),
            tokenizer=tokenizer,
        )
        if pieces[3] != user_suffix:
            raise ConfigError("The chat template ends the first and the last question differently.")
        return template

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """None where the answer ends with one of the tokenizer's end tokens."""
        _, names = self.tokenizer.split(self.separator)
        ends = self.tokenizer.eos_token_ids
        if any(self.tokenizer.encode(name)[0] in ends for name in names[:1]):
            return ()
        return super().stop_sequences

    def render_turn(self, role: str, content: str | Sequence[Part], opening: str) -> list[Part]:
        parts: list[Part] = [content] if isinstance(content, str) else list(content)
        if role == "user":
            before = self._control_parts(opening + self.user_prefix)
            parts = [*before, *parts, *self._control_parts(self.user_suffix)]
        return merge_text(parts)

    def opening(self, system: str = "") -> str:
        """As of all templates; names of special tokens in `system` are broken up."""
        _, names = self.tokenizer.split(system)
        for name in names:
            system = system.replace(name, f"{name[0]} {name[1:]}")
        return super().opening(system)

    def _control_parts(self, text: str) -> list[Part]:
        """A text with its special tokens as `Ids`."""
        texts, names = self.tokenizer.split(text)
        parts: list[Part] = []
        for segment, name in zip(texts, names, strict=False):
            parts += [segment, Ids(self.tokenizer.encode(name))]
        return [*parts, texts[-1]]


# Contents that no template changes, and that stand nowhere in it.
_SYSTEM = "\u241fsystem\u241f"
_PROBES = ("\u241ffirst\u241f", "\u241fanswer\u241f", "\u241fsecond\u241f")
_PROBE = re.compile("\u241f[a-z]+\u241f")


def _without_start(text: str, tokenizer: TextTokenizer) -> str:
    """A beginning without the token that `add_bos` puts before it."""
    texts, names = tokenizer.split(text)
    if names and not texts[0] and tuple(tokenizer.encode(names[0])) == tuple(tokenizer.start_ids):
        return text[len(names[0]) :]
    return text


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate("vicuna", "USER: ", "\nASSISTANT:", "\n", system_suffix="\n"),
        PromptTemplate("llama2", "[INST] ", " [/INST]\n", "\n", "<<SYS>>\n", "\n<</SYS>>\n\n"),
        PromptTemplate("plain", "", "", ""),
    )
}
CHAT = "chat"  # the chat template of the tokenizer
TUNED_TEMPLATES = ("vicuna", "llama2", CHAT)  # of instruction-tuned models


def template_for(hidden_size: int | None) -> str:
    """LLaMA-2's template for the 14B (built on LLaMA-2-chat 13B), Vicuna's for all others."""
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

# Requests of the original inference scripts: about an image, for an image, for a change of one.
DEMO_QUESTIONS = (
    "What is this animal?",
    "Can you generate an image of a dog on the green grass?",
    "Can you make the cat wear sunglasses?",
)


@dataclass(frozen=True)
class TaskPrompts:
    """The sentences of one system; a `tasks` object in `system.json` overrides single ones.

    Some systems write a comparison before the answer: "at the top a shark: no, at the bottom a
    flame: yes - at the bottom". Here and in `stop_after` it is called the verdict.

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


def without_verdict(text: str, after: str) -> str:
    """The text behind a verdict, else all of it; `after`: `TaskPrompts.answer_after`."""
    answer = text.partition(after)[2] if after else ""
    return answer or text


DEFAULT_TASKS = TaskPrompts()
# A pair of request and response in the original models' instruction-tuning data.
ORIGINAL_TASKS = TaskPrompts(
    draw="Please generate an image of {caption}.", draw_response="", edit_response=""
)
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
