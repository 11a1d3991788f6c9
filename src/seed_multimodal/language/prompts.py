"""Prompt templates: turns of text and images → segments for `MultimodalTokenizer.encode_parts`.

    vicuna (8B, nano)   USER: {user}\\nASSISTANT:{answer}\\nUSER: {user}\\nASSISTANT:…
    llama2 (14B)        [INST] {user} [/INST]\\n{answer}\\n[INST] {user} [/INST]\\n…
    plain (pretrained)  {concatenated content}

The prompt starts with `<s>` (`add_bos=True`); there is no end token between turns. An answer is a separate segment, as
in the instruction-tuning data: "ASSISTANT:" followed by a segment starting with the dummy blank. So the ids of a
shorter dialogue are a prefix of a longer one's, and training and inference share this function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seed_multimodal.errors import ConfigError

Part = str | Sequence[int]
Turn = tuple[str, str | Sequence[Part]]  # role, and texts and images (as codes) in order
ROLES = ("user", "assistant")


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
    def user_marker(self) -> str:
        """Prefix of user turns."""
        return self.user_prefix.rstrip()

    @property
    def turn_marker(self) -> str:
        """Prefix of a user's turn after an answer, used as stop string: the original models were trained without end
        token between turns."""
        return self.separator + self.user_marker

    def render(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """Segments of a dialogue; after a user turn it ends where the answer starts."""
        spans: list[Part] = []
        opening = f"{self.system_prefix}{system}{self.system_suffix}" if system else ""
        for role, content in turns:
            spans += self.render_turn(role, content, opening)
            opening = self.separator if role == "user" else opening
        return spans

    def render_turn(self, role: str, content: str | Sequence[Part], opening: str) -> list[Part]:
        """Segments of one turn; `opening`: prefix of a user's."""
        parts = [content] if isinstance(content, str) else content
        return merge_text([opening + self.user_prefix, *parts, self.user_suffix] if role == "user" else parts)


def merge_text(parts: Sequence[Part]) -> list[Part]:
    """Join adjacent texts and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] = merged[-1] + part
        elif not isinstance(part, str) or part:
            merged.append(part)
    return merged


TEMPLATES = {template.name: template for template in (
    PromptTemplate("vicuna", "USER: ", "\nASSISTANT:", "\n", system_suffix="\n"),
    PromptTemplate("llama2", "[INST] ", " [/INST]\n", "\n", "<<SYS>>\n", "\n<</SYS>>\n\n"),
    PromptTemplate("plain", "", "", ""),
)}
TUNED_TEMPLATES = ("vicuna", "llama2")  # of instruction-tuned models


def template_for(hidden_size: int | None) -> str:
    """LLaMA-2's template for the 14B (built on LLaMA-2-chat 13B), Vicuna's for all others."""
    return "llama2" if hidden_size == 5120 else "vicuna"


def get_template(name: str) -> PromptTemplate:
    """A template; raises `ConfigError` for an unknown name."""
    if name not in TEMPLATES:
        raise ConfigError(f"Unknown prompt template {name!r}: use {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]
