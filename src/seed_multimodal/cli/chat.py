"""`seed chat`: a conversation with images in both directions, typed line by line or given with `--message`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import (
    ITEM_ERRORS,
    chosen_settings,
    emit,
    load_system,
    next_free_path,
    save_image,
)
from seed_multimodal.disk import writable_folder
from seed_multimodal.entry import DONE, log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import open_image

HELP = (
    "Type a message; /image FILE shows an image with it, /draw MESSAGE asks for an answer with an image, "
    "/reset starts over, /help prints this, /quit ends."
)
FILES = "image_{}.png"


class Conversation:
    """One conversation: its messages, and the folder of drawn images."""

    def __init__(self, system: Any, args: argparse.Namespace) -> None:
        self.system, self.args, self.folder = system, args, Path(args.out)
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []  # of the next message

    def send(self, text: str, force_image: bool = False) -> None:
        """Send `text` with the attached images, print the answer as it is generated, save its images, keep both
        messages."""
        message = {"role": "user", "content": [*self.images, text]}
        parts, answer = self._follow(
            self.system.chat(
                [*self.messages, message],
                stream=True,
                previews=(),
                seed=self.args.seed,
                force_image=force_image,
                **chosen_settings(self.args),
            )
        )
        self.images = []
        self.messages += [message, {"role": "assistant", "content": answer}]
        if self.args.json:
            note = {"note": answer.note} if answer.note else {}
            emit(self.args, {"message": text, "answer": parts, **note}, "")

    def _follow(self, events: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Print events (unless `--json`) and collect them: the parts of the answer, and the answer itself."""
        parts: list[dict[str, Any]] = []
        answer = None
        for event in events:
            if event["type"] == "text":
                if not (parts and "text" in parts[-1]):
                    parts.append({"text": ""})
                parts[-1]["text"] += event["text"]
                self._print(event["text"])
            elif event["type"] == "image":
                parts.append(
                    {"codes": list(event["codes"])}
                    if hasattr(self.system.images, "section")
                    else {}
                )
                if event["image"] is not None:
                    parts[-1]["image"] = str(
                        save_image(event["image"], next_free_path(self.folder, FILES))
                    )
                self._print(f" [image: {parts[-1].get('image', 'not drawn')}] ")
            elif event["type"] == "image_broken":
                parts.append({"broken": event["reason"]})
                self._print(f" [{event['reason']}] ")
            elif event["type"] == "done":
                answer = event["answer"]
                self._print(f" [{answer.note}]\n" if answer.note else "\n")
        return parts, answer

    def _print(self, text: str) -> None:
        if not self.args.json:
            print(text, end="", flush=True)


def chat(args: argparse.Namespace) -> int:
    """Run the conversation; without `--message` it reads lines until /quit or end of input."""
    images = [open_image(file) for file in args.image]  # before loading the weights
    writable_folder(args.out, ConfigError)
    talk = Conversation(load_system(args), args)
    talk.images = images
    for message in args.message or ():
        talk.send(message, args.force_image)
    return DONE if args.message else _read_lines(talk)


def _read_lines(talk: Conversation) -> int:
    log_line(HELP)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            break
        try:
            if word == "/reset":
                talk.messages, talk.images = [], []
                log_line("A new conversation.")
            elif word == "/image":
                talk.images.append(open_image(rest.strip()))
                log_line(f"{rest.strip()} goes with your next message.")
            elif word == "/draw":
                talk.send(rest.strip(), force_image=True)
            elif word.startswith("/"):
                log_line(HELP)
            elif word:
                talk.send(line.strip(), talk.args.force_image)
        except ITEM_ERRORS as error:
            if talk.args.debug:
                raise
            log_line(f"seed: {error}")  # the conversation continues
    return DONE
