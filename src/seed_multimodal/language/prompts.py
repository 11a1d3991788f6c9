"""Prompt templates: a list of turns -> spans of text and pictures, ready for `MultimodalTokenizer.encode_parts`.

    vicuna (8B, nano)   USER: {user}\\nASSISTANT:{answer}\\nUSER: {user}\\nASSISTANT:…
    llama2 (14B)        [INST] {user} [/INST]\\n{answer}\\n[INST] {user} [/INST]\\n…
    plain (pretrained)  {everything, one after the other}

`<s>` goes in front of the whole (`add_bos=True`); there is no end token between turns. An answer is a span of its own,
as in the instruction-tuning data: "ASSISTANT:" followed by a span starting with the dummy blank. So the ids of a
rendered dialogue begin with the ids of every shorter one, and training and inference share this function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.vocabulary import ImageVocabulary

Part = str | Sequence[int]
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One side's turn: texts and pictures (as codes) in order."""

    role: str
    content: tuple[Part, ...]

    @classmethod
    def of(cls, turn: Any) -> Turn:
        """A `Turn`, a `(role, content)` pair or a `{"role", "content"}` mapping; content may be a single text.

        Raises:
            RequestError: another shape, or a role other than user and assistant.
        """
        if isinstance(turn, Turn):
            role, content = turn.role, turn.content
        elif isinstance(turn, Mapping) and {"role", "content"} <= set(turn):
            role, content = turn["role"], turn["content"]
        elif isinstance(turn, (tuple, list)) and len(turn) == 2:
            role, content = turn
        else:
            raise RequestError(f"A turn is a role and its content, not {turn!r:.80}.")
        if role not in ROLES:
            raise RequestError(f"Unknown role {role!r}: use {' or '.join(ROLES)}.")
        return cls(role, (content,) if isinstance(content, str) else tuple(content))


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a user's turn; `user_marker` opens every user turn, so the last one can be found."""

    name: str
    user_prefix: str
    user_suffix: str
    separator: str
    user_marker: str
    system_prefix: str = ""
    system_suffix: str = ""

    @property
    def turn_marker(self) -> str:
        """What opens a user's turn after an answer: there an answer ends; `""` for a template without roles.

        The released models saw no end token between turns, so some of their answers run into the next question.
        """
        return self.separator + self.user_marker if self.user_prefix else ""

    def render(self, turns: Sequence[Any], system: str = "") -> list[Part]:
        """Spans of a dialogue; after a user turn it ends where the answer begins.

        Args:
            turns: `Turn`s or what `Turn.of` accepts.
            system: an instruction before everything (the released models were tuned without one).

        Raises:
            RequestError: a turn of another shape.
        """
        spans: list[Part] = []
        opening = f"{self.system_prefix}{system}{self.system_suffix}" if system else ""
        for turn in map(Turn.of, turns):
            spans += self.render_turn(turn, opening)
            opening = self.separator if turn.role == "user" else opening
        return spans

    def render_turn(self, turn: Turn, opening: str) -> list[Part]:
        """Spans of one turn; `opening` goes before a user's."""
        if turn.role == "user":
            return merge_text([opening + self.user_prefix, *turn.content, self.user_suffix])
        return merge_text(turn.content)

    def render_text(self, turns: Sequence[Any], vocabulary: ImageVocabulary, bos: str = "<s>", system: str = "") -> str:
        """The same dialogue as the one string the released scripts give to their tokenizer."""
        return bos + "".join(span if isinstance(span, str) else vocabulary.image_text(span)
                             for span in self.render(turns, system))


def merge_text(parts: Sequence[Part]) -> list[Part]:
    """Join neighbouring texts and drop empty ones: a span is what stands between pictures."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] = merged[-1] + part
        elif not isinstance(part, str) or part:
            merged.append(part)
    return merged


TEMPLATES = {template.name: template for template in (
    PromptTemplate("vicuna", "USER: ", "\nASSISTANT:", "\n", "USER:", system_suffix="\n"),
    PromptTemplate("llama2", "[INST] ", " [/INST]\n", "\n", "[INST]", "<<SYS>>\n", "\n<</SYS>>\n\n"),
    PromptTemplate("plain", "", "", "", "\n"),
)}


LLAMA2_WIDTH = 5120
TUNED_TEMPLATES = ("vicuna", "llama2")  # of models that answer


def template_for(hidden_size: int | None) -> str:
    """LLaMA-2's template for the 14B (built on LLaMA-2-chat 13B), Vicuna's for all others."""
    return "llama2" if hidden_size == LLAMA2_WIDTH else "vicuna"


def get_template(name: str) -> PromptTemplate:
    """Look up a template.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"Unknown prompt template {name!r}: use {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]
