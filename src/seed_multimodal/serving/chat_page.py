"""What the chat page's buttons do: images and texts in, an answer out, over the backend's `/generate`; no Gradio.

`Kind` holds the differences between the models that a page can use.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.images.io import (
    ImageLimits,
    chat_image,
    fit_longer_side,
    image_from_base64,
    image_to_base64,
    image_to_bytes,
    open_image,
    request_image,
)
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.prompts import DEMO_QUESTIONS, DESCRIBE_PROMPT, QA_SUFFIX, SEED_X_TASKS
from seed_multimodal.language.vocabulary import BOX_WORDS, PLACEHOLDER
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.serving.client import follow_generate
from seed_multimodal.serving.dialogue import Dialogue

if TYPE_CHECKING:
    from PIL import Image

STILL_ANSWERING = "The model is still answering the last message; go on when it has."
LOST_IMAGE = "(an image that could not be drawn)"
UPLOADS = ImageLimits(max_bytes=64 << 20)
STORED_SIDE = 512  # of what `chat_image` makes of an image
WHOLE_SIDE = 1792  # four views of 448 pixels: SEED-X sees no more
IN_CODES = "An image is read and written as 32 codes."
IN_DYNAMIC = ("An image has as many codes as there is to see in it. An image alone is described, a question about it "
              "is answered, and “Force an image” draws what words and images say. Every message stands alone.")
IN_VIEWS = "It sees the whole image and parts of it, and shows where things are."


@dataclass(frozen=True)
class Kind:
    """The differences between the models that a page can use.

    Attributes:
        whole: images are sent as they are (at most `WHOLE_SIDE` pixels), not squashed as the released demo did.
        ratios: shapes that it draws in; a kind with them is asked with its own settings, not those of the sliders.
    """

    template: str
    title: str
    temperature: float = 1.0
    examples: tuple[str, ...] = ()
    remark: str = IN_CODES
    whole: bool = False
    rounds: int = 3
    ratios: tuple[str, ...] = ()


_FIND = SEED_X_TASKS.detect_request("the dog")


def _of_seed_x(title: str, *more: str, template: str = "conv_seed_llama2") -> Kind:
    examples = (SEED_X_TASKS.describe, *more)
    return Kind(template, title, 0.0, examples, IN_VIEWS, whole=True)


def _of_lavit(title: str, *examples: str) -> Kind:
    return Kind("conv_lavit", title, examples=examples, remark=IN_DYNAMIC, whole=True, ratios=tuple(RATIOS))


KINDS = {
    "nano": Kind("conv_seed_vicuna", "SEED Multimodal · nano", 0.0, rounds=5, examples=(
        "Please draw a noto dog left of a tree in a meadow.", "Put it at night.", DESCRIBE_PROMPT,
        f"What is the background?{QA_SUFFIX}")),
    "seed-llama-8b": Kind("conv_seed_vicuna", "SEED-LLaMA 8B", examples=DEMO_QUESTIONS),
    "seed-llama-14b": Kind("conv_seed_llama2", "SEED-LLaMA 14B", examples=DEMO_QUESTIONS),
    "seed-x": _of_seed_x("SEED-X", "What is this?", template="conv_seed_x"),
    "seed-x-i": _of_seed_x("SEED-X-I", _FIND, "Generate an image: a dog on the green grass"),
    "seed-x-edit": _of_seed_x("SEED-X-Edit", "Make it under the sunset"),
    "lavit": _of_lavit("LaVIT", "What is in the picture?", "A red apple on a white plate."),
    "nano-lavit": _of_lavit("SEED Multimodal · nano-lavit", "What is the background?", "a noto fox in a meadow"),
    "nano-x": _of_seed_x("SEED Multimodal · nano-x", _FIND, "Generate an image: a noto dog left of a tree"),
}


def kind_of(model_type: str) -> Kind:
    """Look up a model type; raises `ConfigError` for an unknown one."""
    if model_type not in KINDS:
        raise ConfigError(f"Unknown model type {model_type!r}: use {', '.join(KINDS)}.")
    return KINDS[model_type]


@dataclass
class ChatPage:
    """The buttons' handlers; every method takes and returns the visitor's own `Dialogue`.

    Args:
        folder: where images of the conversations are kept.
    """

    address: str
    kind: Kind
    folder: Path
    timeout: float = 600.0
    post: Callable[..., Iterator[dict[str, Any]]] = field(default=follow_generate)
    decoding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(2), repr=False)

    def new_dialogue(self) -> Dialogue:
        """The conversation a visitor starts with."""
        return Dialogue(self.kind.template)

    def add(self, dialogue: Dialogue, image: str | None, text: str | None) -> str:
        """Put an image and/or a text into the pending message; returns a message about a problem (`""`: none)."""
        if dialogue.asking:
            return STILL_ANSWERING
        try:
            if image:
                with self.decoding:  # two images at once
                    stored = self._for_page(image)
                dialogue.add_image(self._store(stored))
            if text and text.strip():
                before = dialogue.pending["text"]
                dialogue.add_text((" " if before and not before.endswith(PLACEHOLDER) else "") + text.strip())
        except SeedError as error:
            return str(error)
        return ""

    def answer(self, dialogue: Dialogue, *, max_turns: int, force_boi: bool, ratio: str | None = None,
               **settings: Any) -> Generator[list[str], None, str]:
        """Ask the backend; gives the previews of the answer's images each time one comes, and returns a message about
        a problem (`""`: the answer is in the dialogue)."""
        dialogue.max_turns, shown = int(max_turns), dict[int, str]()
        if self.kind.ratios:
            settings = {"ratio": ratio} if force_boi else {}
        if dialogue.asking:
            return STILL_ANSWERING
        if not dialogue.waits():
            return "Write a message or choose an image first."
        if dialogue.too_long():
            dialogue.refuse()
            return ""
        asked = dialogue.asking = dialogue.conversation
        try:
            body = dialogue.request(self._for_request, force_boi=force_boi, **settings)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                for piece in self.post(self.address, {**body, "previews": True}, self.timeout):
                    if dialogue.asking is not asked:  # its visitor has cleared it meanwhile
                        return ""
                    if "preview" in piece:
                        shown[piece["picture"]] = self._store_base64(piece["preview"], Path(folder))
                        yield [*shown.values()]
                    else:
                        dialogue.receive(piece, self._store_base64)
                        self._keep_boxes(dialogue, piece.get("boxes", ()))
        except SeedError as error:
            return str(error) if dialogue.asking is asked else ""
        finally:
            if dialogue.asking is asked:
                dialogue.asking = None
        return ""

    def regenerate(self, dialogue: Dialogue, **settings: Any) -> Generator[list[str], None, str]:
        """Ask for the last answer again as `answer` does; without a new one the old one stays."""
        if dialogue.asking:
            return STILL_ANSWERING
        before = copy.deepcopy(vars(dialogue))
        dialogue.regenerate()
        trouble = yield from self.answer(dialogue, **settings)
        if trouble:
            vars(dialogue).update(before)
        return trouble

    def messages(self, dialogue: Dialogue, previews: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The conversation as Gradio's Chatbot shows it: texts and images in order; last an answer of `previews`."""
        shown: list[dict[str, Any]] = []
        for entry in dialogue.conversation.messages:
            said = entry["message"]
            role = "user" if entry["role"] == dialogue.conversation.roles[0] else "assistant"
            pieces = said["text"].split(PLACEHOLDER)
            content: list[Any] = [pieces[0]]
            for path, piece in zip(said["images"], pieces[1:], strict=True):
                content += [{"path": path, "alt_text": "image"} if path else LOST_IMAGE, piece]
            content = [BOX_WORDS.sub(" ", part).strip() if isinstance(part, str) else part for part in content]
            content += [{"path": path, "alt_text": "what was found"} for path in said.get("boxed", ())]
            shown.append({"role": role, "content": [part for part in content if part] or ["(nothing)"]})
        if dialogue.errors and shown:
            failed = "Some images failed: " if LOST_IMAGE in shown[-1]["content"] else ""
            shown[-1]["content"].append(failed + " ".join(dialogue.errors))
        if previews:
            shown.append({"role": "assistant", "content": [{"path": path, "alt_text": "preview"} for path in previews]})
        return shown

    def _for_page(self, file: str) -> Image.Image:
        """An uploaded image as it is kept; small ones of models that see it whole as they are."""
        if not self.kind.whole:
            return chat_image(open_image(file, limits=UPLOADS, at_least=2 * STORED_SIDE))
        image = open_image(file, limits=UPLOADS, at_least=WHOLE_SIDE)
        return image if max(image.size) <= WHOLE_SIDE else fit_longer_side(image, WHOLE_SIDE)

    def _for_request(self, path: str) -> str:
        image = open_image(path)
        return image_to_base64(image if self.kind.whole else request_image(image))

    def _keep_boxes(self, dialogue: Dialogue, boxes: Sequence[dict[str, Any]]) -> None:
        """Draw the boxes of the last answer on their images, which are shown below it."""
        known = [path for entry in dialogue.conversation.messages for path in entry["message"]["images"]]
        on: dict[str, list[list[int]]] = {}
        for found in boxes:
            path = known[found["image"]]
            if path:
                size = open_image(path).size
                on.setdefault(path, []).append([int(share * side) for share, side in
                                                zip(found["box"], (*size, *size), strict=True)])
        drawn = [self._store(draw_boxes(open_image(path), corners)) for path, corners in on.items()]
        if drawn:
            dialogue.conversation.messages[-1]["message"]["boxed"] = drawn

    def _store(self, image: Image.Image, folder: Path | None = None) -> str:
        data = image_to_bytes(image)
        path = (folder or self.folder) / f"{hashlib.md5(data, usedforsecurity=False).hexdigest()}.png"
        path.write_bytes(data)
        return str(path)

    def _store_base64(self, text: str, folder: Path | None = None) -> str:
        return self._store(image_from_base64(text, name="the answer's image"), folder)
