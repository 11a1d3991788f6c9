"""Prompt templates: turns of text and images → segments for `MultimodalTokenizer.encode_parts`.

    vicuna (8B, nano)   USER: {user}\\nASSISTANT:{answer}\\nUSER: {user}\\nASSISTANT:…
    llama2 (14B)        [INST] {user} [/INST]\\n{answer}\\n[INST] {user} [/INST]\\n…
    plain (pretrained)  {concatenated content}

The prompt starts with `<s>` (`add_bos=True`); there is no end token between turns. An answer is a
separate segment, as in the instruction-tuning data: "ASSISTANT:" followed by a segment starting
with the dummy blank. So the ids of a shorter dialogue are a prefix of a longer one's, and training
and inference share this function.

`TaskPrompts`: the request sentences of the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import Part

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
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end an answer: the opening of the next turn.

        The original models saw no end token between turns, so they continue with a question.
        """
        return (self.turn_marker,) if self.turn_marker else ()

    def render(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """Segments of a dialogue; after a user turn it ends where the answer starts."""
        segments: list[Part] = []
        opening = f"{self.system_prefix}{system}{self.system_suffix}" if system else ""
        for role, content in turns:
            segments += self.render_turn(role, content, opening)
            if role == "user":
                opening = self.separator
        return segments

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


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate("vicuna", "USER: ", "\nASSISTANT:", "\n", system_suffix="\n"),
        PromptTemplate("llama2", "[INST] ", " [/INST]\n", "\n", "<<SYS>>\n", "\n<</SYS>>\n\n"),
        PromptTemplate("plain", "", "", ""),
    )
}
TUNED_TEMPLATES = ("vicuna", "llama2")  # of instruction-tuned models


def template_for(hidden_size: int | None) -> str:
    """LLaMA-2's template for the 14B (built on LLaMA-2-chat 13B), Vicuna's for all others."""
    return "llama2" if hidden_size == 5120 else "vicuna"


def get_template(name: str) -> PromptTemplate:
    """A template; raises `ConfigError` for an unknown name."""
    if name not in TEMPLATES:
        raise ConfigError(f"Unknown prompt template {name!r}: use {', '.join(TEMPLATES)}.")
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
