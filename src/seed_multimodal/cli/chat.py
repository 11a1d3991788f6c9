"""`seed chat`: a conversation with images in both directions, typed line by line or given with `--message`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import (
    ITEM_ERRORS,
    Outputs,
    drawing_settings,
    emit,
    generation_settings,
    load_system,
    save_image,
)
from seed_multimodal.entry import DONE, log_line
from seed_multimodal.images.io import open_image

HELP = ("Type a message; /image FILE shows an image with it, /picture MESSAGE asks for an answer with an image, "
        "/reset starts over, /help prints this, /quit ends.")


class Talk:
    """One conversation: its messages, and the folder of drawn images."""

    def __init__(self, system: Any, args: argparse.Namespace) -> None:
        self.system, self.args = system, args
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []  # of the next message
        self.outputs = Outputs(f"{args.out}/", sources=Path(args.out).glob("turn_*"))  # of earlier conversations

    def send(self, text: str, force_image: bool = False) -> None:
        """Send `text` with the attached images, print the answer as it is generated, save its images, keep both
        messages."""
        message = {"role": "user", "content": [*self.images, text]}
        options = {"seed": self.args.seed, **generation_settings(self.args), **drawing_settings(self.args)}
        if self.args.json or self.args.no_previews or not sys.stdout.isatty():
            options["previews"] = ()
        parts, answer = self._follow(self.system.chat([*self.messages, message], stream=True, force_image=force_image,
                                                      **options))
        self.images = []
        self.messages += [message, {"role": "assistant", "content": answer}]
        if self.args.json:
            note = {"note": answer.note} if answer.note else {}
            emit(self.args, {"message": text, "answer": parts, **note}, "")

    def _follow(self, events: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Print events (unless `--json`) and collect them: the parts of the answer, and the answer itself."""
        parts: list[dict[str, Any]] = []
        answer, path = None, None  # path: where a preview of the image that is being made is
        try:
            for event in events:
                if event["type"] == "text":
                    if parts and "text" in parts[-1]:
                        parts[-1]["text"] += event["text"]
                    else:
                        parts.append({"text": event["text"]})
                    self._print(event["text"])
                elif event["type"] == "image_preview":  # the whole image replaces it
                    path = save_image(event["image"], path or self._next_file())
                    self._print(f" [after {len(event['codes'])} codes: {path}] ")
                elif event["type"] == "image":
                    has_codes = hasattr(self.system.images, "section")
                    part: dict[str, Any] = {"codes": list(event["codes"])} if has_codes else {}
                    if event["image"] is not None:
                        part["picture"] = str(save_image(event["image"], path or self._next_file()))
                    parts.append(part)
                    path = None
                    self._print(f" [image: {part.get('picture', 'not drawn')}] ")
                elif event["type"] == "image_broken":
                    parts.append({"broken": event["reason"]})
                    self._print(f" [{event['reason']}] ")
                elif event["type"] == "done":
                    answer = event["answer"]
                    if answer.note:
                        self._print(f" [{answer.note}]")
        finally:
            if path is not None:  # the image of this preview broke off, or Ctrl-C was pressed
                path.unlink(missing_ok=True)
        self._print("\n")
        return parts, answer

    def _next_file(self) -> Path:
        return self.outputs.next(f"turn_{len(self.messages) // 2 + 1}")

    def _print(self, text: str) -> None:
        if not self.args.json:
            print(text, end="", flush=True)


def chat(args: argparse.Namespace) -> int:
    """Run the conversation; without `--message` it reads lines until /quit or end of input."""
    images = [open_image(file) for file in args.image]  # before the weights, which take minutes
    talk = Talk(load_system(args), args)
    talk.images = images
    for message in args.message or ():
        talk.send(message, args.force_image)
    return DONE if args.message else _read_lines(talk)


def _read_lines(talk: Talk) -> int:
    typed = sys.stdin.isatty()
    if typed:
        log_line(HELP)
    while True:
        if typed:
            print("you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        word, _, rest = line.strip().partition(" ")
        if not line or word in ("/quit", "/exit"):
            return DONE
        try:
            if word == "/reset":
                talk.messages, talk.images = [], []
                log_line("A new conversation.")
            elif word == "/image":
                talk.images.append(open_image(rest.strip()))
                log_line(f"{rest.strip()} goes with your next message.")
            elif word == "/picture":
                talk.send(rest.strip(), force_image=True)
            elif word.startswith("/"):
                log_line(HELP)
            elif word:
                talk.send(line.strip(), talk.args.force_image)
        except ITEM_ERRORS as error:
            if talk.args.debug:
                raise
            log_line(f"seed: {error}")  # the conversation continues
