"""`seed chat`: a conversation with images in both directions, typed line by line or given with
`--message`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.cli.common import (
    ITEM_ERRORS,
    Outputs,
    chosen_settings,
    emit,
    image_sources,
    load_system,
    next_free_path,
)
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import DONE, log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image, save_image
from seed_multimodal.models.registry import NEEDS
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.world import DESCRIPTION

if TYPE_CHECKING:
    from seed_multimodal.language.answer import Answer, Event
    from seed_multimodal.pipelines.base import MultimodalSystem

HELP = (
    "Type a message; /image FILE shows an image with it, /draw MESSAGE asks for an answer with an "
    "image, /reset starts over, /help prints this, /quit ends."
)
FILE_PATTERN = "image_{}.png"


class Conversation:
    """One conversation: its messages, and the folder of drawn images."""

    def __init__(self, system: MultimodalSystem, args: Namespace) -> None:
        self.system = system
        self.args = args
        self.folder = Path(args.out)
        self.messages: list[JsonObject] = []
        self.images: list[Image.Image] = []  # of the next message

    def send(self, text: str, force_image: bool = False) -> None:
        """Send `text` with the attached images, print the answer as it is generated, save its
        images, and keep both messages."""
        # Streams decode an image when its codes are complete; previews are for pages.
        message = {"role": "user", "content": [*self.images, text]}
        events = self.system.chat(
            [*self.messages, message],
            stream=True,
            previews=(),
            seed=self.args.seed,
            force_image=force_image,
            **chosen_settings(self.args),
        )
        parts, answer = self._follow(events)

        # A failed message is not kept, and its images are shown with the next one.
        self.images = []
        self.messages += [message, {"role": "assistant", "content": answer}]
        if self.args.json:
            record = {"message": text, "answer": parts}
            # What is not printed: the model's comparison before its answer.
            for name in ("reasoning", "note"):
                if getattr(answer, name):
                    record[name] = getattr(answer, name)
            emit(self.args, record, "")

    def _follow(self, events: Iterable[Event]) -> tuple[list[JsonObject], Answer]:
        """Print events (unless `--json`) and collect them: the parts of the answer, and the answer
        itself."""
        parts: list[JsonObject] = []
        answer = None
        has_codes = self.system.abilities.draws_codes
        for event in events:
            if event["type"] == "text":
                # Pieces of one text, until an image comes.
                if not (parts and "text" in parts[-1]):
                    parts.append({"text": ""})
                parts[-1]["text"] += event["text"]
                self._print(event["text"])
            elif event["type"] == "image":
                # Codes where the system has them, and the file unless the image was not decoded.
                part: JsonObject = {"codes": list(event["codes"])} if has_codes else {}
                image = event["image"]
                if image is not None:
                    path = save_image(image, next_free_path(self.folder, FILE_PATTERN))
                    part["image"] = str(path)
                    if DESCRIPTION in image.info:
                        part["description"] = image.info[DESCRIPTION]
                parts.append(part)
                self._print(f" [image: {part.get('image', 'not drawn')}] ")
            elif event["type"] == "image_broken":
                parts.append({"broken": event["reason"]})
                self._print(f" [{event['reason']}] ")
            elif event["type"] == "done":
                answer = event["answer"]
                self._print(f" [{answer.note}]\n" if answer.note else "\n")
        # Both streams share a terminal: the descriptions follow the answer's last line.
        for part in parts:
            if "description" in part:
                log_line(f"read back: {part['description']}")
        assert answer is not None  # every stream ends with it
        return parts, answer

    def _print(self, text: str) -> None:
        if not self.args.json:
            print(text, end="", flush=True)


def chat(args: Namespace) -> int:
    """Run the conversation; without `--message` it reads lines until /quit or end of input."""
    # Wrong flags are reported before the weights are loaded.
    if "-" in args.image and not args.message:
        raise ConfigError("--image -: standard input has the image; give --message for the text.")
    sources = image_sources(args.image)
    images = [open_image(sources[name]).image for name in args.image]
    Outputs(args.out, 2)  # a folder: answers may have several images
    SystemConfig.find(args.model).check_ability(NEEDS["chat"])
    conversation = Conversation(load_system(args), args)
    conversation.images = images
    if not args.message:
        return _read_lines(conversation)
    for message in args.message:
        conversation.send(message, args.force_image)
    return DONE


def _read_lines(conversation: Conversation) -> int:
    """Send the lines of stdin, and follow the commands among them."""
    log_line(HELP)
    for line in sys.stdin:
        # `/command argument`, or a message.
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if command == "/quit":
            break
        try:
            if command == "/reset":
                conversation.messages = []
                conversation.images = []
                log_line("A new conversation.")
            elif command == "/image" and argument:
                conversation.images.append(open_image(argument).image)
                log_line(f"{argument} goes with your next message.")
            elif command == "/draw" and (argument or conversation.images):
                conversation.send(argument, force_image=True)
            elif command.startswith("/"):
                log_line(HELP)
            elif command:
                conversation.send(line.strip(), conversation.args.force_image)
        except ITEM_ERRORS as error:
            if conversation.args.debug:
                raise
            log_line(f"seed: {error}")  # the conversation continues
    return DONE
