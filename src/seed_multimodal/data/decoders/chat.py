"""General decoder: `messages` → a dialogue in a prompt template, as at inference.

    <s>USER: [image]question\\nASSISTANT:answer[image]\\nUSER: question\\nASSISTANT:answer</s>

Answers are learned, each with `</s>` as the token that follows it. Before a further turn `</s>` is
only a label: the sequence has the separator of turns in its place, as prompts have. Control words
in texts stay plain text, as in prompts. White space next to an image is stripped, except at the
end of a prompt before a learned answer, as at inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    SeededRandom,
    Segment,
    SegmentList,
    SegmentPart,
    segment_labels,
)
from seed_multimodal.data.formats.conversations import ContentPart
from seed_multimodal.data.formats.record import BadRecord, RecordFields, shorten
from seed_multimodal.language.prompts import CHAT, TEMPLATES, PromptTemplate, get_template
from seed_multimodal.language.vocabulary import IGNORE_INDEX, Ids
from seed_multimodal.settings import setting


class Chat(Decoder):
    """A conversation of texts and images.

    Fields: `messages` from `formats.conversations.with_messages`, and the `system` message.
    """

    name = "chat"

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        template: str = setting("vicuna", choices=(*TEMPLATES, CHAT))

    options: Options

    @cached_property
    def template(self) -> PromptTemplate:
        return get_template(self.options.template, self.tokenizer)

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        # 1. The turns, with one view of each image.
        turns: list[tuple[str, list[SegmentPart]]] = []
        for turn_index, message in enumerate(self.require(fields, "messages", list)):
            parts: list[SegmentPart] = []
            for part_index, part in enumerate(message["content"]):
                name = f"messages[{turn_index}].content[{part_index}]"
                parts.append(self._text_or_codes(part, name, rng))
            turns.append((message["role"], parts))

        # 2. The parts of each turn.
        segments: list[Segment] = []
        for role, parts in self.template.render_turns(turns, fields.get("system") or ""):
            for part in parts:
                segments.append(Segment([part], learned=role == "assistant"))
        return SegmentList(segments)

    def _join(self, segmented: SegmentList) -> tuple[list[int], list[int]]:
        segments = segmented.segments
        eos = self.tokenizer.eos_token_id
        has_separator = bool(self.template.turn_marker)
        ids = list(self.tokenizer.start_ids)
        labels = [IGNORE_INDEX] * len(ids)
        for index, segment in enumerate(segments):
            previous = segments[index - 1] if index else None
            following = segments[index + 1] if index + 1 < len(segments) else None
            segment_ids = self._encode_segment(segment, previous, following)
            ids += segment_ids
            labels += segment_labels(segment, segment_ids)
            # The first token of the next question is in the position of `</s>`.
            answer_ended = previous is not None and previous.learned and not segment.learned
            if answer_ended and has_separator:
                labels[-len(segment_ids)] = eos
        return [*ids, eos], [*labels, eos]

    def _encode_segment(
        self, segment: Segment, previous: Segment | None, following: Segment | None
    ) -> list[int]:
        """Ids of a segment, a text without white space next to images."""
        (part,) = segment.parts  # see `_segment`
        if isinstance(part, Ids):
            return list(part)
        if not isinstance(part, str):
            return self.encode([part])
        if not self.tokenizer.strips_at_images:
            return self.tokenizer.encode_parts([part])
        if previous is not None and not isinstance(previous.parts[0], str):
            part = part.lstrip()
        # As at inference, white space at the end of a prompt stays.
        if following is not None and not isinstance(following.parts[0], str):
            is_prompt_end = following.learned and not segment.learned
            if not is_prompt_end:
                part = part.rstrip()
        return self.tokenizer.encode_parts([part], strip=False)

    def _text_or_codes(self, part: ContentPart, name: str, rng: SeededRandom) -> SegmentPart:
        """A part of a message; of several views of an image one is chosen."""
        if isinstance(part, str):
            return part
        codes = part.get("codes")
        if not codes:
            raise BadRecord(
                "not tokenised",
                f"{name}: must be text or an image with codes, not {shorten(part)}; "
                "tokenize the data first.",
            )
        views = codes if isinstance(codes[0], list) else [codes]
        return self.sample_view(views, f"{name}.codes", rng)
