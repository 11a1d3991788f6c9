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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import Ids

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
    def stop_sequences(self) -> tuple[str, ...]:
        """Texts that end an answer: the opening of the next turn.

        The original models saw no end token between turns, so they continue with a question.
        """
        return (self.turn_marker,) if self.turn_marker else ()

    def render(self, turns: Sequence[Turn], system: str = "") -> list[Part]:
        """Segments of a dialogue; after a user turn it ends where the answer starts."""
        return [part for _, parts in self.render_turns(turns, system) for part in parts]

    def render_turns(self, turns: Sequence[Turn], system: str = "") -> list[tuple[str, list[Part]]]:
        """Role and segments of each turn: what precedes an answer is the user's."""
        rendered: list[tuple[str, list[Part]]] = []
        opening = self.opening(system)
        for role, content in turns:
            rendered.append((role, self.render_turn(role, content, opening)))
            if role == "user":
                opening = self.separator
        return rendered

    def opening(self, system: str) -> str:
        """What precedes the first user's turn."""
        return f"{self.system_prefix}{system}{self.system_suffix}" if system else ""

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
    """The chat template of a tokenizer: it writes placeholders, which the contents then replace.

    So it decides where system messages, images and empty blocks of thoughts stand, and names of
    special tokens in contents stay text. An answer ends with a token, which the next turn begins
    with. The fields of the base class are those of a conversation of texts.

    answer_start: what it writes after the last question.
    takes_texts: whether a content may be a text; image: what it writes for an image's part of a
    content, empty if contents cannot be lists of parts: images then stand between the texts.
    """

    tokenizer: TextTokenizer = field(kw_only=True)
    answer_start: str = field(kw_only=True)
    takes_texts: bool = field(kw_only=True)
    image: str = field(kw_only=True)

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> ChatTemplate:
        """Probe a tokenizer's template. Raises ConfigError: none, or it does not keep contents."""
        # 1. The form of contents.
        texts = [_text_part(0), _text_part(1)]
        with_image = [_text_part(0), {"type": "image"}, _text_part(1)]
        image = ""
        takes_texts = _PLACEHOLDER.search(_try_render(tokenizer, _placeholder(0))) is not None
        plain = _try_render(tokenizer, texts)
        if _indices(plain) == [0, 1]:
            image = _inserted(plain, _try_render(tokenizer, with_image))

        # 2. What stands around the contents of a conversation.
        messages = [
            _text_message(role, index, takes_texts)
            for index, role in enumerate(("user", "assistant", "user"))
        ]
        text = tokenizer.render_chat(messages)
        if _indices(text) != [0, 1, 2]:
            raise ConfigError("The chat template drops, repeats or reorders messages.")
        # The pattern has three groups, which `split` returns, too.
        start, user_suffix, between, answer_start = _PLACEHOLDER.split(text)[::4]

        # 3. What opens both questions is a user's prefix, but for the token that ends an answer;
        #    it begins at a special token, where there is one.
        ends, names = tokenizer.split(between)
        after_end = between[len(ends[0]) + len(names[0]) :] if names else between
        user_prefix = os.path.commonprefix((start[::-1], after_end[::-1]))[::-1]
        ends, names = tokenizer.split(user_prefix)
        if names:
            user_prefix = user_prefix[len(ends[0]) :]
        return cls(
            CHAT,
            user_prefix,
            user_suffix,
            between.removesuffix(user_prefix),
            tokenizer=tokenizer,
            answer_start=answer_start,
            takes_texts=takes_texts,
            image=image,
        )

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        """None where the answer ends with one of the tokenizer's end tokens."""
        _, names = self.tokenizer.split(self.separator)
        ends = self.tokenizer.eos_token_ids
        if any(self.tokenizer.encode(name)[0] in ends for name in names[:1]):
            return ()
        return super().stop_sequences

    def render_turns(self, turns: Sequence[Turn], system: str = "") -> list[tuple[str, list[Part]]]:
        """Raises RequestError: the template refuses the conversation."""
        # 1. The template's text; a placeholder stands for a whole content or for a text in it.
        contents = _Contents()
        messages: list[dict[str, object]] = []
        system_turn: list[Turn] = [("system", system)] if system else []
        for role, content in [*system_turn, *turns]:
            parts = merge_text([content] if isinstance(content, str) else content)
            has_image = not all(isinstance(part, str) for part in parts)
            if has_image and self.image:
                messages.append({"role": role, "content": contents.add_parts(role, parts)})
            else:
                messages.append(
                    _text_message(role, contents.add_whole(role, parts), self.takes_texts)
                )
        try:
            text = _without_start(self.tokenizer.render_chat(messages), self.tokenizer)
        except ConfigError as error:
            raise RequestError(str(error)) from error
        pieces = contents.replace(text, self.image)

        # 2. What precedes an answer is the user's turn. A blank that the template writes only
        #    before given answers is generated with the answer.
        rendered: list[tuple[str, list[Part]]] = []
        prompt: list[Part] = []
        for before, role, parts in pieces:
            if role != "assistant":
                prompt += [*self._control_parts(before), *parts]
            elif rendered and not prompt:  # further parts of the same answer
                rendered[-1][1].extend([*self._control_parts(before), *parts])
            else:
                blank = ""
                if before.startswith(self.answer_start):
                    blank = before[len(self.answer_start) :]
                    before = self.answer_start
                rendered.append(("user", [*prompt, *self._control_parts(before)]))
                rendered.append(("assistant", [*self._control_parts(blank), *parts]))
                prompt = []
        if turns[-1][0] == "user":
            rendered.append(("user", [*prompt, *self._control_parts(contents.end)]))
        return [(role, merge_text(parts)) for role, parts in rendered]

    def _control_parts(self, text: str) -> list[Part]:
        """A text with its special tokens as `Ids`."""
        texts, names = self.tokenizer.split(text)
        parts: list[Part] = []
        for segment, name in zip(texts, names, strict=False):
            parts += [segment, Ids(self.tokenizer.encode(name))]
        return [*parts, texts[-1]]


# White space around a placeholder is lost where a template strips contents; that inside it is
# escaped where a template takes texts only and writes a list as Python's or JSON's text.
_SPACE = "\x0b"
_PLACEHOLDER = re.compile("(\x0b?)\u241f([0-9]+)\x0b\u241f(\x0b?)")


def _placeholder(index: int) -> str:
    return f"{_SPACE}\u241f{index}{_SPACE}\u241f{_SPACE}"


def _text_part(index: int) -> dict[str, str]:
    return {"type": "text", "text": _placeholder(index)}


def _text_message(role: str, index: int, takes_texts: bool) -> dict[str, object]:
    """A message that is one placeholder."""
    content = _placeholder(index) if takes_texts else [_text_part(index)]
    return {"role": role, "content": content}


def _indices(text: str) -> list[int]:
    """The placeholders in a text, in order."""
    return [int(match[2]) for match in _PLACEHOLDER.finditer(text)]


def _try_render(tokenizer: TextTokenizer, content: object) -> str:
    """One user's message in the chat template, empty where it refuses this form of content."""
    try:
        return tokenizer.render_chat([{"role": "user", "content": content}])
    except ConfigError:
        return ""


def _inserted(text: str, longer: str) -> str:
    """What `longer` has in addition to a text, or nothing: it was not made by one insertion."""
    start = len(os.path.commonprefix((text, longer)))
    length = len(longer) - len(text)
    inserted = longer[start : start + max(length, 0)]
    return inserted if longer[start + length :] == text[start:] else ""


class _Contents:
    """The contents of a conversation's messages, for which placeholders stand in its text."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, list[Part]]] = []  # role, and what a placeholder stands for
        self._images: list[tuple[str, Part]] = []
        self.end = ""  # the text behind the last content

    def add_whole(self, role: str, parts: list[Part]) -> int:
        """The number of a placeholder for all of a message."""
        self._texts.append((role, parts))
        return len(self._texts) - 1

    def add_parts(self, role: str, parts: list[Part]) -> list[Mapping[str, str]]:
        """A message as a list of images, and of placeholders for its texts."""
        content: list[Mapping[str, str]] = []
        for part in parts:
            if isinstance(part, str):
                content.append(_text_part(len(self._texts)))
                self._texts.append((role, [part]))
            else:
                content.append({"type": "image"})
                self._images.append((role, part))
        return content

    def replace(self, text: str, image: str) -> list[tuple[str, str, list[Part]]]:
        """The text before each content, the role, and the content, in the order of the text.

        image: what stands for an image. Raises RequestError: contents are lost, or reordered.
        """
        images = iter(self._images)
        pattern = _PLACEHOLDER.pattern
        if self._images:
            pattern += "|" + re.escape(image)
        pieces: list[tuple[str, str, list[Part]]] = []
        indices: list[int] = []
        position = 0
        for match in re.finditer(pattern, text):
            if match[2] is None:
                role, codes = next(images, ("", []))
                parts: list[Part] = [codes]
            else:
                indices.append(int(match[2]))
                role, parts = self._texts[indices[-1]]
                parts = _stripped(parts, left=not match[1], right=not match[3])
            pieces.append((text[position : match.start()], role, parts))
            position = match.end()
        self.end = text[position:]

        # A system message may stand anywhere.
        turns = [index for index in indices if self._texts[index][0] != "system"]
        is_complete = sorted(indices) == list(range(len(self._texts)))
        n_images = len(pieces) - len(indices)
        if not is_complete or turns != sorted(turns) or n_images != len(self._images):
            raise RequestError("The chat template drops, repeats or reorders parts of messages.")
        return pieces


def _stripped(parts: Sequence[Part], *, left: bool, right: bool) -> list[Part]:
    """A content without the white space at its ends."""
    stripped = list(parts)
    if left and stripped and isinstance(stripped[0], str):
        stripped[0] = stripped[0].lstrip()
    if right and stripped and isinstance(stripped[-1], str):
        stripped[-1] = stripped[-1].rstrip()
    return stripped


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
