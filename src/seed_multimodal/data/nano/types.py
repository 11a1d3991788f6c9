"""Record types of the nano set, for loader and builder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STYLE_NAMES = {"twemoji": "twemoji", "noto": "noto", "fluent": "fluent", "openmoji": "openmoji"}


@dataclass(frozen=True)
class QA:
    """A question about one picture. `kind`: thing, style, group, subgroup, colour, tone or yesno."""

    question: str
    answer: str
    kind: str


@dataclass
class NanoRecord:
    """One picture and its words; the pixels are in `NanoSet.images()` at the same index."""

    key: str
    style: str
    family: str
    label: str
    split: str
    captions: list[str]
    qa: list[QA]
    group: str
    subgroup: str
    tags: list[str]
    colour: str
    tone: str | None = None
    gender: str | None = None
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        """The .json member of the shard (the key is the member's name)."""
        data = {name: value for name, value in vars(self).items() if name not in ("key", "qa") and value is not None}
        data["qa"] = [[qa.question, qa.answer, qa.kind] for qa in self.qa]
        return data


@dataclass(frozen=True)
class Edit:
    """Picture `source` + `instruction` -> `response` text and picture `target`. `kind`: style, person, swap or tone.

    `split` is the target's; only in test_combo may the source be a train picture (it is given, not asked for).
    """

    source: str
    target: str
    instruction: str
    response: str
    kind: str
    split: str


@dataclass(frozen=True)
class NanoConversation:
    """Turns in order: `{"role": "user" | "assistant", "content": [text | {"image": key}, ...]}`."""

    split: str
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Keys of the pictures shown, in order."""
        return [part["image"] for message in self.messages for part in message["content"] if isinstance(part, dict)]
