"""General decoder: `messages` → a dialogue in a prompt template, as at inference.

    <s>USER: [image]question\\nASSISTANT:answer[image]\\nUSER: question\\nASSISTANT:answer</s>

Answers are learned, each with `</s>` as the token that follows it. Before a further turn `</s>` is
only a label: the sequence has the separator of turns in its place, as prompts have. Control words
in texts stay plain text, as in prompts. White space next to an image is stripped, except at the
end of a prompt before a learned answer, as at inference.
"""

from __future__ import annotations

from dataclasses import dataclass

from seed_multimodal.data.decoders.base import Codes, SeededRandom, SegmentList
from seed_multimodal.data.decoders.seed_llama_sft import TemplateOptions, TunedDecoder
from seed_multimodal.data.formats.record import BadRecord, JsonObject, RecordFields, shorten
from seed_multimodal.language.prompts import CHAT, TEMPLATES
from seed_multimodal.settings import setting


class Chat(TunedDecoder):
    """A conversation of texts and images.

    Fields: `messages` from `formats.conversations.with_messages`, and the `system` message.
    """

    name = "chat"
    joins_segments = True
    has_plain_texts = True
    learns_turn_ends = True

    @dataclass(frozen=True)
    class Options(TemplateOptions):
        template: str = setting("vicuna", choices=(*TEMPLATES, CHAT))

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        turns = self.messages(fields, lambda part, name: self._codes(part, name, rng))
        return self.dialogue(self.template, turns, fields.get("system") or "")

    def _codes(self, part: JsonObject, name: str, rng: SeededRandom) -> Codes:
        """The codes of an image; of several views one is chosen."""
        codes = part.get("codes")
        if not codes:
            raise BadRecord(
                "not tokenised",
                f"{name}: must be text or an image with codes, not {shorten(part)}; "
                "tokenize the data first.",
            )
        views = codes if isinstance(codes[0], list) else [codes]
        return self.sample_view(views, f"{name}.codes", rng)
