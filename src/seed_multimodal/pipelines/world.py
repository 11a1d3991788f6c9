"""`World`: what a system of a few learned things knows about requests, by another package.

[project.entry-points."seed_multimodal.worlds"]
known_words = "my_package:open_world"    # the file of the key in `system.json` → a `World`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import find_entry

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.language.messages import ContentPart, Message

# In `Image.info` of a drawing that was read back.
DESCRIPTION = "description"
NOTE = "note"
PREFACE = "I do not know this kind of picture. Nearest: "  # of an answer about an unlike image


class World:
    """Base, and the world of all systems that learned anything: it knows of no limits.

    listed: what users may name, by kind.
    """

    listed: Mapping[str, Sequence[str]] = {}

    def read(self, conversation: Sequence[Message]) -> Sequence[Message]:
        """A conversation in the words that the system learned; what was read stays."""
        return conversation

    def notes(self, message: Message, ignored: Sequence[str], drawing: bool) -> list[str]:
        """Sentences about words of a message that were read otherwise, or are unknown.

        ignored: texts of the prompt template, in lower case, which a user may write himself.
        drawing: words count that the system can say, but not draw.
        """
        return []

    def asks_about_picture(self, conversation: Sequence[Message]) -> bool:
        """Whether the last message is a question that no picture answers."""
        return False

    def picture_to_change(
        self, conversation: Sequence[Message], reads_codes: bool
    ) -> ContentPart | None:
        """The picture that the last message asks to change.

        reads_codes: whether the system can describe codes, as servers have them.
        """
        return None

    def note(
        self,
        which: str,
        conversation: Sequence[Message],
        claim: str,
        before: str | None,
        after: str,
    ) -> str:
        """What of a drawing contradicts its request; "": nothing.

        which: the drawing, as "The image". claim: what the model said before it.
        before, after: descriptions of the picture that had to be changed, if any, and of the
            drawing.
        """
        return ""


class Familiarity:
    """Base, and that of all systems that do not measure how far images are from those they learned.

    measures: whether distances are numbers.
    """

    measures = False

    def distances(self, embed: Callable[[], Tensor], pixels: Tensor) -> Sequence[float | None]:
        """Of each image; above 0 it is unlike what was learned, None: not measured.

        embed: what the conditioner of the de-tokenizer reads of the images, `[B, E]` or
            `[B, N, W]`.
        pixels: normalised, `[B, 3, S, S]`.
        """
        return [None] * len(pixels)


def open_world(file: Path | None) -> World:
    """The world of a system's `known_words`. Raises ConfigError: no package reads them."""
    return World() if file is None else _reader("known_words")(file)


def open_familiarity(
    folder: Path | None, decoder: Path | None, pictures: Path | None
) -> Familiarity:
    """Of a system's `known_images`; without a de-tokenizer nothing is measured.

    decoder, pictures: folders with the de-tokenizer's conditioner and VAE.
    Raises ConfigError: no package reads them.
    """
    if folder is None or decoder is None or pictures is None or not decoder.is_dir():
        return Familiarity()
    familiarity: Familiarity = _reader("known_images")(folder, decoder, pictures)
    return familiarity


def _reader(key: str) -> Any:
    return import_entry(find_entry(registered("worlds"), key, "world"))


def unknown_images_note(distances: Sequence[float | None], notice: str) -> str:
    """A note about images unlike those that the system learned, or empty; `notice`: its own."""
    unknown = [index for index, value in enumerate(distances) if value is not None and value > 0]
    if not unknown:
        return ""
    if len(distances) == 1:
        which = "The image is"
    elif len(unknown) == 1:
        which = f"Image {unknown[0]} is"
    else:
        which = f"Images {', '.join(map(str, unknown))} are"
    note = f"{which} unlike those that this system learned, so the answer may be wrong."
    return f"{note} {notice}".strip()
