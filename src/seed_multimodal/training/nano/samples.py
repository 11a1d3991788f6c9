"""Training sequences of the nano language model: captions both ways, then the five instruction tasks.

Sequences are built by the same functions that build prompts at inference (language.prompts), so that the model
meets in use exactly what it was trained on. Pictures a model reads come from any view; pictures it writes are the
unaugmented ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.data.nano import NanoSet
from seed_multimodal.language import tasks
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer

IGNORED = -100
PRETRAIN_SHARES = {"image_first": 0.5, "text_first": 0.5}
SFT_SHARES = {"image_first": 0.05, "text_first": 0.10, "describe": 0.20, "qa": 0.25, "draw": 0.15, "edit": 0.17,
              "chat": 0.08}
MAX_NOISE = 0.35
Part = str | Sequence[int]


@dataclass
class TrainingSequence:
    """One training sequence: token ids and, of the same length, labels (-100: not learned)."""

    ids: list[int]
    labels: list[int]


class SampleMaker:
    """Draws training sequences; everything random comes from the generator given to `draw`."""

    def __init__(self, nano: NanoSet, words: MultimodalTokenizer, codes: Tensor, index: Sequence[int],
                 split: str) -> None:
        self.nano, self.words, self.codes = nano, words, codes.long()
        self.index = list(index)
        kept = {nano.records[i].key for i in self.index}
        self.edits = [e for e in nano.edits if e.split == split and {e.source, e.target} <= kept]
        self.chats = [c for c in nano.conversations if c.split == split and set(c.keys) <= kept]
        self.template = get_template("vicuna")
        self.tasks = tasks.NANO_TASKS
        self._texts: dict[str, list[int]] = {}

    def draw(self, shares: dict[str, float], generator: torch.Generator) -> TrainingSequence:
        """One sequence of a task drawn by `shares` (tasks without material fall back to describing)."""
        names = list(shares)
        task = names[int(torch.multinomial(torch.tensor([shares[n] for n in names]), 1, generator=generator))]
        if (task == "edit" and not self.edits) or (task == "chat" and not self.chats):
            task = "describe"
        result: TrainingSequence = getattr(self, f"_{task}")(generator)
        return result

    def _pick(self, items: Sequence[Any], generator: torch.Generator) -> Any:
        return items[int(torch.randint(len(items), (), generator=generator))]

    def _seen(self, picture: int, generator: torch.Generator) -> list[int]:
        """Codes of a picture the model reads: any view, and up to 35 % of them those of another picture.

        There are few pictures and many passes over them; without such noise the model learns them by heart, and a
        picture in a style it has not seen that thing in is read as the nearest one it knows.
        """
        codes = self._view(picture, generator)
        share = MAX_NOISE * torch.rand((), generator=generator)
        wrong = torch.rand(codes.shape, generator=generator) < share
        other = self._view(self._pick(self.index, generator), generator)
        return torch.where(wrong, other, codes).tolist()

    def _view(self, picture: int, generator: torch.Generator) -> Tensor:
        return self.codes[picture, int(torch.randint(self.codes.shape[1], (), generator=generator))]

    def _written(self, picture: int) -> list[int]:
        return self.codes[picture, 0].tolist()

    def _pair(self, generator: torch.Generator) -> tuple[int, str]:
        picture = self._pick(self.index, generator)
        return picture, self._caption(picture, generator)

    def _caption(self, picture: int, generator: torch.Generator) -> str:
        """The canonical caption half of the time, any other one otherwise."""
        captions = self.nano.records[picture].captions
        if torch.rand((), generator=generator) < 0.5:
            return captions[0]
        return str(self._pick(captions, generator))

    def _image_first(self, generator: torch.Generator) -> TrainingSequence:
        picture, caption = self._pair(generator)
        return self._all(self.words.encode_parts([self._seen(picture, generator), caption]))

    def _text_first(self, generator: torch.Generator) -> TrainingSequence:
        picture, caption = self._pair(generator)
        return self._all(self.words.encode_parts([caption, self._written(picture)]))

    def _all(self, ids: list[int]) -> TrainingSequence:
        line = [self.words.bos_id, *ids, self.words.eos_id]
        return TrainingSequence(line, list(line))

    def _describe(self, generator: torch.Generator) -> TrainingSequence:
        picture = self._pick(self.index, generator)
        question: list[Part] = [self._seen(picture, generator), self.tasks.describe]
        return self._answered([("user", question)], [self.nano.records[picture].captions[0]])

    def _qa(self, generator: torch.Generator) -> TrainingSequence:
        picture = self._pick(self.index, generator)
        qa = self._pick(self.nano.records[picture].qa, generator)
        question: list[Part] = [self._seen(picture, generator), self.tasks.question(qa.question)]
        return self._answered([("user", question)], [qa.answer])

    def _draw(self, generator: torch.Generator) -> TrainingSequence:
        picture, caption = self._pair(generator)
        request = self.tasks.draw_request(caption)
        return self._answered([("user", [request])], [self.tasks.draw_response, self._written(picture)])

    def _edit(self, generator: torch.Generator) -> TrainingSequence:
        edit = self._pick(self.edits, generator)
        source, target = self.nano.index[edit.source], self.nano.index[edit.target]
        question: list[Part] = [self._seen(source, generator), edit.instruction]
        return self._answered([("user", question)], [self.tasks.edit_response, self._written(target)])

    def _chat(self, generator: torch.Generator) -> TrainingSequence:
        """One answer of a conversation, after everything said before it."""
        chat = self._pick(self.chats, generator)
        turns = [(m["role"], [self._content(part) for part in m["content"]]) for m in chat.messages]
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        last = int(self._pick(answers, generator))
        return self._answered(turns[:last], turns[last][1])

    def _content(self, part: Any) -> Part:
        return part if isinstance(part, str) else self._written(self.nano.index[part["image"]])

    def _answered(self, turns: Sequence[tuple[str, list[Part]]], answer: Sequence[Part]) -> TrainingSequence:
        """Prompt by the template (not learned), then the answer and the end (learned)."""
        prompt = self.words.encode_parts(self.template.render(turns))
        prompt = prompt if prompt[0] == self.words.bos_id else [self.words.bos_id, *prompt]
        reply = [*self.words.encode_parts(list(answer)), self.words.eos_id]
        return TrainingSequence(prompt + reply, [IGNORED] * len(prompt) + reply)


def collate(sequences: Sequence[TrainingSequence], limit: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels `[B, L]`, L the longest (cut at `limit`); padding is 0 and not learned."""
    length = min(limit, max(len(s.ids) for s in sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    labels = torch.full((len(sequences), length), IGNORED)
    for row, s in enumerate(sequences):
        size = min(length, len(s.ids))
        ids[row, :size] = torch.tensor(s.ids[:size])
        labels[row, :size] = torch.tensor(s.labels[:size])
    return ids, labels
