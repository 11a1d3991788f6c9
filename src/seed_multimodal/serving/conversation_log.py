"""The chat page's log of conversations and votes, in the format of the original page.

    DIR/2026-11-25-conv.json    a JSON object a line
    DIR/images/MD5.png          the images of the conversations

Keys of the original: `tstamp`, `type` ("common" for an answer, "upvote", "downvote"), `state` (the
conversation) and `ip`, which stays empty: visitors' addresses are not logged. Further keys: `model`
and `settings` of the last answer, `reasoning` of a message, and the type "withdrawn" for a vote
that was taken back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from seed_multimodal.disk import JsonObject, atomic_open, folder_lock, writable_folder, writing
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.serving.turns import Turn

ROLES = {"user": "USER", "assistant": "ASSISTANT"}


@dataclass(frozen=True)
class ConversationLog:
    """Raises ConfigError: the folder is not writable."""

    folder: Path

    def __post_init__(self) -> None:
        writable_folder(self.folder / "images", ConfigError)

    def add(self, kind: str, model: str, turns: Sequence[Turn]) -> None:
        """Log a conversation that ends with an answer, whose `settings` are logged with it.

        kind: "common", "upvote", "downvote" or "withdrawn".

        Raises:
            DataError: disk error; no part of the line is written.
        """
        now = time.time()
        file = self.folder / f"{datetime.fromtimestamp(now):%Y-%m-%d}-conv.json"
        with writing(file, DataError):
            record = {
                "tstamp": round(now, 4),
                "type": kind,
                "state": self._state(turns),
                "ip": "",
                "model": model,
                "settings": turns[-1].settings,
            }
            with folder_lock(self.folder, DataError, timeout=-1):
                append_line(file, json.dumps(record))

    def _state(self, turns: Sequence[Turn]) -> JsonObject:
        """The conversation as the original's `Conversation.dict()`; stores its images."""
        messages = []
        for turn in turns:
            text = ""
            images = []
            codes = []
            for part in turn.sent_parts:
                if isinstance(part, str):
                    text += part
                else:
                    text += PLACEHOLDER
                    images.append(self._store_image(Path(part.path)))
                    codes.append(part.codes)
            message: JsonObject = {"text": text, "images": images, "images_ids": codes}
            if turn.reasoning:
                message["reasoning"] = turn.reasoning
            messages.append({"role": ROLES[turn.role], "message": message})
        return {
            "system": "",
            "roles": [*ROLES.values()],
            "messages": messages,
            "offset": 0,
            "sep": "\n",
            "sep2": None,
        }

    def _store_image(self, image: Path) -> str:
        """Copy an image, once; returns the name of the copy."""
        content = image.read_bytes()
        name = f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.png"
        copy = self.folder / "images" / name
        if not copy.exists():
            with atomic_open(copy) as handle:
                handle.write(content)
        return name


def append_line(file: Path, line: str) -> None:
    """Append a whole line, or nothing if the disk is full. Raises OSError."""
    with open(file, "ab", buffering=0) as handle:
        size = handle.tell()
        content = f"{line}\n".encode()
        try:
            while content:
                content = content[handle.write(content) :]
        except OSError:
            os.ftruncate(handle.fileno(), size)
            raise
