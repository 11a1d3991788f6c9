"""One message to `Lavit` and its answer, in one piece or as events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.language.answer import TextPart
from seed_multimodal.language.generation import room_for_answer
from seed_multimodal.language.lavit import LavitTokenizer, Side, answer_of, caption_of, question_prompts
from seed_multimodal.language.lavit_generation import WrittenPicture
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.systems.chat import Answer, DrawnPart, read_messages
from seed_multimodal.systems.lavit_language import Inputs, LavitLanguage, Seeds, Watch
from seed_multimodal.systems.lavit_pictures import LavitPictures, composed_parts
from seed_multimodal.systems.pictures import is_picture
from seed_multimodal.systems.speaker import Event
from seed_multimodal.systems.talking import System


class MessageSystem(System):
    """Base of `Lavit`, which describes, answers and draws, but does not converse."""

    tokenizer: LavitTokenizer
    language: LavitLanguage
    pictures: LavitPictures

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[False] = False, **options: Any) -> Answer: ...

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[True], **options: Any) -> Iterator[Event]: ...

    def chat(self, messages: Sequence[Any], stream: bool = False, *, force_image: bool = False,
             previews: Sequence[int] | None = None, watch: Watch = None, **options: Any) -> Answer | Iterator[Event]:
        """The answer to one message: a caption of its picture, an answer to a question about it, or a picture
        (`force_image`) of what it says; events as of `TalkingSystem.chat`. Streams are written without beams.

        Args:
            watch: called before each word and before drawing; what it raises ends the answer.

        Raises:
            RequestError: a conversation of several messages; what `check_message` raises.
        """
        contents = read_messages(messages)
        if len(contents) > 1:
            raise RequestError("LaVIT answers single messages, it was not taught to converse: start over (/reset) and "
                               "send one message.")
        items, decode = contents[0][1], self._take_decode(options)
        task = _task_of(items, force_image)
        if force_image:
            events = self._picture_events(items, task, options, decode, watch)
        else:
            events = self._text_events(items, task, {"num_beams": 1, **options} if stream else options, watch)
        return events if stream else next(event["answer"] for event in events if event["type"] == "done")

    def check_message(self, items: Sequence[Any], *, force_image: bool = False, **options: Any) -> None:
        """Refuse what `chat` would refuse, before any work and without waiting for that of others; `items` of the
        message, whose pictures are not looked at. Settings of drawing are left to `chat`: the de-tokenizer checks them,
        and it may be at work.

        Raises:
            RequestError: a text without a picture, codes where pictures are read. ConfigError: a setting.
            CheckpointError: parts that this system does not have. GenerationError: too many words, however little there
                is to see.
        """
        self._take_decode(options)
        options.pop("seed", None)
        self.language.settings(_task_of(items, force_image), **options)
        unread = sum(1 for item in items if is_picture(item))
        if force_image:
            self.spec.require("decoder", "pixels")
            known = [part for part in composed_parts(list(items)) if not is_picture(part)]
            length = len(self.tokenizer.drawing_ids(known)) + unread + 1  # a start
        else:
            self.spec.require("understanding")
            _ = self.pictures.reading_model()
            length = 3 * unread + len(self.tokenizer.text_ids("".join(_prompts_of(items))))
        room_for_answer(length, self.llm, unread)

    def _written(self, prompts: list[list[Any]], task: str, seed: Any, options: dict[str, Any],
                 decode: dict[str, Any]) -> list[WrittenPicture]:
        """Pictures as the model wrote them, each with a code; wrong settings of drawing are refused before."""
        raise NotImplementedError

    def _inputs(self, images: Sequence[Any], prompts: str | Sequence[str] | None, seeds: Seeds, selection: str | None,
                side: Side) -> Inputs | None:
        """What the language model reads of pictures, or lists of them; None for none."""
        raise NotImplementedError

    def _picture_events(self, items: list[Any], task: str, options: dict[str, Any], decode: dict[str, Any],
                        watch: Watch) -> Iterator[Event]:
        seed = options.pop("seed", 0)
        yield {"type": "image_start"}
        written = self._written([composed_parts(items)], task, seed, {**options, "watch": watch}, decode)[0]
        if watch is not None:
            watch()
        drawn: Image.Image = self.pictures.draw([written.codes], seed=seed or 0, **decode)[0]
        codes = written.codes.tolist()
        yield {"type": "image", "codes": codes, "image": drawn}
        note = " ".join(filter(None, (written.note, self.note(items))))
        yield {"type": "done", "answer": Answer((DrawnPart(codes, image=drawn),), tuple(written.ids), note)}

    def _text_events(self, items: list[Any], task: str, options: dict[str, Any], watch: Watch) -> Iterator[Event]:
        pictures = [item for item in items if is_picture(item)]
        prompts = _prompts_of(items)
        cut, after = (answer_of, self.spec.answer_after) if task == "ask" else (caption_of, "")
        settings, seeds = self.language.asked(task, [pictures], options)
        inputs = self._inputs([pictures], prompts or None, seeds, None, "answer" if prompts else "caption")
        assert inputs is not None
        said = text = ""
        with contextlib.closing(self.language.stream(inputs, settings, seeds, watch)) as texts:
            for text in texts:
                if after not in text:  # it may still be a verdict
                    continue
                whole = cut(answer_in(text, after))
                if len(whole) > len(said):
                    yield {"type": "text", "text": whole[len(said):]}
                    said = whole
                if len(whole) < len(answer_in(text, after).strip()):
                    break
        if not said and (said := cut(text)):
            yield {"type": "text", "text": said}
        yield {"type": "done", "answer": Answer((TextPart(said),), note=self.note(items),
                                                answer_after=self.spec.answer_after)}


def _prompts_of(items: Sequence[Any]) -> list[str]:
    """The question of a message as the model is asked it, if there is one."""
    words = " ".join(item for item in items if isinstance(item, str)).strip()
    return question_prompts(words) if words else []


def _task_of(items: Sequence[Any], force_image: bool) -> str:
    """What a message asks for: "describe", "ask", "draw" or "compose"."""
    if force_image:
        return "draw" if all(isinstance(item, str) for item in items) else "compose"
    if any(not isinstance(item, str) and not is_picture(item) for item in items):
        raise RequestError("LaVIT reads pictures to answer; codes can be part of what is drawn only.")
    if not any(map(is_picture, items)):
        raise RequestError("LaVIT answers about pictures: show one with the message, or ask for a picture as the "
                           "answer.")
    return "ask" if any(isinstance(item, str) and item.strip() for item in items) else "describe"
