"""`seed chat`: a conversation with pictures in both directions, typed line by line or given with `--message`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import (
    OF_ONE_PICTURE,
    Outcomes,
    OutputNames,
    drawing_settings,
    emit,
    generation_settings,
    load_system,
    opened,
    save_picture,
)
from seed_multimodal.entry import DONE, SOME_FAILED, log_line
from seed_multimodal.errors import RequestError

ALONE = ("/help", "/reset", "/quit", "/exit")
HELP = ("Type a message; /image FILE shows a picture with it, /picture MESSAGE asks for an answer with a picture, "
        "/reset starts over, /help says this, /quit ends.")


class Talk:
    """One conversation: its messages, and the folder of drawn pictures."""

    def __init__(self, system: Any, args: argparse.Namespace) -> None:
        self.system = system
        self.args = args
        self.messages: list[dict[str, Any]] = []
        self.shown: list[Any] = []
        self.names = OutputNames(None, args.out, 0, map(str, Path(args.out).glob("turn_*")))  # of earlier conversations
        self._at_start, self._after_aside = True, False  # where printing stands: no blank needed; one needed

    def show(self, path: str) -> bool:
        """Attach a picture to the next message; False (and a sentence) if it cannot be read."""
        for _, image in opened([path], Outcomes(1), self.args.debug):
            self.shown.append(image)
            return True
        return False

    def send(self, text: str, force_image: bool = False) -> None:
        """Send `text` with the attached pictures, print the answer as it is generated, save its pictures, store both
        messages."""
        asked = {"role": "user", "content": [*self.shown, text]}
        options = {"seed": self.args.seed, **generation_settings(self.args), **drawing_settings(self.args)}
        if self.args.json or self.args.no_previews or not sys.stdout.isatty():  # nobody looks on
            options["previews"] = ()
        parts, answer = self._follow(self.system.chat([*self.messages, asked], stream=True, force_image=force_image,
                                                      **options))
        self.shown = []
        self.messages += [asked, {"role": "assistant", "content": answer}]
        if self.args.json:
            note = {"note": answer.note} if answer.note else {}
            emit(self.args, {"message": text, "answer": parts, **note}, "")

    def reset(self) -> None:
        """Drop all messages."""
        self.messages, self.shown = [], []

    def _follow(self, events: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Print events (unless `--json`) and collect them: the parts of the answer, and the answer itself."""
        parts: list[dict[str, Any]] = []
        answer, path = None, None  # path: where a preview of the picture that is being made lies
        try:
            for event in events:
                if event["type"] == "text":
                    if parts and "text" in parts[-1]:
                        parts[-1]["text"] += event["text"]
                    else:
                        parts.append({"text": event["text"]})
                    self._print(event["text"])
                elif event["type"] == "image_preview":  # in the place of the picture, which replaces it
                    path = save_picture(event["image"], path or self._next_name())
                    self._print_aside(f"after {len(event['codes'])} codes: {path}")
                elif event["type"] == "image":
                    part: dict[str, Any] = {"codes": list(event["codes"])} if self.system.pictures.has_codes else {}
                    if event["image"] is not None:
                        path = save_picture(event["image"], path or self._next_name())
                        part["picture"] = str(path)
                    parts.append(part)
                    path = None
                    self._print_aside(f"picture: {part.get('picture', 'not drawn')}")
                elif event["type"] == "image_broken":
                    parts.append({"broken": event["reason"]})
                    self._print_aside(event["reason"])
                elif event["type"] == "done":
                    answer = event["answer"]
                    if answer.note:
                        self._print_aside(answer.note)
        finally:
            if path is not None:  # the picture of this preview never came: it broke off, or Ctrl-C was pressed
                path.unlink(missing_ok=True)
        self._print("\n")
        return parts, answer

    def _next_name(self) -> Path:
        return self.names.next(f"turn_{len(self.messages) // 2 + 1}")

    def _print(self, text: str) -> None:
        """Print words of the answer, with a blank after a preceding bracket."""
        if self.args.json or not text:
            return
        blank = " " if self._after_aside and not text[0].isspace() else ""
        print(blank + text, end="", flush=True)
        self._after_aside, self._at_start = False, text[-1].isspace()

    def _print_aside(self, text: str) -> None:
        """Print a remark that is no word of the answer, in brackets."""
        self._print(f"[{text}]" if self._at_start else f" [{text}]")
        self._after_aside = True


def chat(args: argparse.Namespace) -> int:
    """Run the conversation; without `--message` it reads lines until /quit or end of input."""
    for picture in args.image:
        if not os.path.isfile(picture):
            raise RequestError(f"{picture}: there is no such picture.")
    talk = Talk(load_system(args), args)
    if not all(talk.show(picture) for picture in args.image):
        return SOME_FAILED
    if args.message:
        for message in args.message:
            talk.send(message, args.force_image)
        return DONE
    return _read_lines(talk)


def _read_lines(talk: Talk) -> int:
    typed = sys.stdin.isatty()
    if typed:
        log_line(HELP)
    while True:
        if typed:
            print("you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            return DONE
        line = line.strip()
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if line == "/help":
            log_line(HELP)
        elif line == "/reset":
            talk.reset()
            log_line("A new conversation.")
        elif word == "/image":
            if not rest:
                log_line("/image needs a file: /image FILE.")
            elif talk.show(rest):
                log_line(f"{rest} goes with your next message.")
        elif word in ALONE:
            log_line(f"{word} must be alone on its line.")
        elif re.fullmatch(r"/[a-z]+", word) and word != "/picture":
            log_line(f"There is no command {word}. {HELP}")
        elif line:
            text = rest if word == "/picture" else line
            try:
                talk.send(text, talk.args.force_image or text != line)
            except OF_ONE_PICTURE as error:
                if talk.args.debug:
                    raise
                log_line(f"seed: {error}")  # the conversation continues
