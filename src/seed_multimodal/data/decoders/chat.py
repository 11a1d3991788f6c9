"""General decoder: `messages` → a dialogue in a prompt template, as at inference.

    <s>USER: [image]question\\nASSISTANT:answer[image]\\nUSER: question\\nASSISTANT:answer</s>

Answers are learned, each with `</s>` as the token that follows it. Before a further turn `</s>` is only a label: the
sequence has the separator of turns in its place, as prompts have.
Control words in texts stay plain text, as in prompts. White space next to an image is stripped, except at the end of a
prompt before a learned answer, as at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    Part,
    SeededRandom,
    Segment,
    SegmentList,
)
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import TEMPLATES, get_template
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import setting


class Chat(Decoder):
    """A conversation of texts and images: `messages` from `formats.conversations.with_messages`, and the `system`
    message."""

    name = "chat"

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        template: str = setting("vicuna", choices=tuple(TEMPLATES))

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        turns = [
            (message["role"], message["content"]) for message in self.need(fields, "messages", list)
        ]
        rendered = [
            (
                role,
                [
                    self._part(part, f"messages[{place}].content[{number}]", rng)
                    for number, part in enumerate(content)
                ],
            )
            for place, (role, content) in enumerate(turns)
        ]
        template, system = get_template(self.options.template), fields.get("system") or ""
        segments: list[Segment] = []
        for place in range(
            len(rendered)
        ):  # turns of a shorter dialogue are a prefix of a longer one's
            parts = template.render(rendered[: place + 1], system)
            segments += [Segment([part], learned=place % 2 == 1) for part in parts[len(segments) :]]
        return SegmentList(segments)

    def _join(self, segmented: SegmentList) -> tuple[list[int], list[int]]:
        segments = segmented.segments
        separated = bool(get_template(self.options.template).turn_marker)
        ids, labels = [self.tokenizer.bos_id], [IGNORE_INDEX]
        for place, segment in enumerate(segments):
            previous = segments[place - 1] if place else None
            following = segments[place + 1] if place + 1 < len(segments) else None
            part = segment.parts[0]
            if isinstance(part, str):
                if previous and not isinstance(previous.parts[0], str):
                    part = part.lstrip()
                prompt_ends = following and following.learned and not segment.learned
                if following and not isinstance(following.parts[0], str) and not prompt_ends:
                    part = part.rstrip()
                piece = self.tokenizer.encode_parts([part], strip=False)
            else:
                piece = self.encode([part])
            ids += piece
            labels += piece if segment.learned else [IGNORE_INDEX] * len(piece)
            answer_ended = previous is not None and previous.learned and not segment.learned
            if answer_ended and separated:
                labels[-len(piece)] = self.tokenizer.eos_id
        return [*ids, self.tokenizer.eos_id], [*labels, self.tokenizer.eos_id]

    def _part(self, part: Any, name: str, rng: SeededRandom) -> Part:
        if isinstance(part, str):
            return part
        if not part.get("codes"):
            raise BadRecord(
                "not tokenised",
                f"{name}: must be text or an image with codes, not {shorten(part)}; "
                "tokenize the data first.",
            )
        codes = part["codes"]
        return self.one_view(codes if isinstance(codes[0], list) else [codes], f"{name}.codes", rng)
