"""Conversations stored as alternating texts; both released modules have these two, with different markers around the
turns.

    pretrain.*   "USER: " question "\\nASSISTANT: "   (a blank at the end, which becomes a token of its own)
    sft.*        "USER: " question "\\nASSISTANT:"       (with `template: llama2` "[INST] " question " [/INST]\\n")

Answers and the `</s>` at the very end are learned. Each turn is tokenised on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from seed_multimodal.data.decoders.base import LIST, PICTURES, TEXT, Decoder, DecoderOptions, Draft, Part, Span
from seed_multimodal.data.decoders.phrases import ASSISTANT, USER
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import TUNED_TEMPLATES, get_template
from seed_multimodal.settings import setting


def with_full_stop(answer: str) -> str:
    """The answer, ending in a full stop."""
    return answer if answer.endswith(".") else answer + "."


@dataclass(frozen=True)
class Prompted(DecoderOptions):
    """Options of instruction tuning. template: the words around a user's turn, those that the trained model is asked
    with; the released data code has Vicuna's only."""

    template: str = setting("vicuna", choices=TUNED_TEMPLATES)


class _Turns(Decoder):
    """Markers around turns. `sft` ignores the names of the roles, as released."""

    tuned: ClassVar[bool] = False  # the instruction-tuning module's markers

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        roles: tuple[str, str] = (USER[:-1], ASSISTANT[:-1])
        sep: str = "\n"
        system_message: str = ""

    def _spans(self, turns: Sequence[str], first: Sequence[Part], system: str) -> list[Span]:
        """`first`: the whole content of the first question, pictures included."""
        user, assistant = (USER[:-1], ASSISTANT[:-1]) if self.tuned else self.options.roles
        sep = self.options.sep
        before, after = f"{user}: ", f"{sep}{assistant}:" + ("" if self.tuned else " ")
        spans: list[Span] = []
        if self.tuned and self.options.template != "vicuna":
            words = get_template(self.options.template)
            before, after, sep = words.user_prefix, words.user_suffix, words.separator
            system = f"{words.system_prefix}{system}{words.system_suffix}" if system else ""
        if system:
            spans.append(Span([system if system.endswith(sep) else system + sep], learned=False))
        for place, said in enumerate(turns):
            if place % 2:
                spans.append(Span([said]))
            else:
                content = first if place == 0 else [said]
                spans.append(Span([f"{sep if place else ''}{before}", *content, after], learned=False))
        return spans

    def _texts(self, fields: Mapping[str, Any]) -> list[str]:
        turns = self.list_of(fields, "data")
        wrong = next((n for n, said in enumerate(turns) if not isinstance(said, str)), None)
        if wrong is not None:
            raise BadRecord("wrong type", f"data[{wrong}]: must be a text, not {shorten(turns[wrong])}.")
        if self.validate and (not turns or len(turns) % 2):
            raise BadRecord("wrong role", f"data: holds {len(turns)} texts; questions and answers come in pairs.")
        return turns

    def _all_text(self, spans: Sequence[Span]) -> str:
        return self.as_text([part for span in spans for part in span.parts])


class TextConversation(_Turns):
    """A conversation without pictures. Field: `data`, question and answer in turn.

    Options:
        system_message: said before everything, not learned. sep: between turns. roles: the two names.
    """

    name = "pretrain.text_conversation"
    needs = {"data": LIST}
    reads_pictures = False

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if fields.get("data") is None:
            return self.lacking(["data"], {"filter_flag": False})
        turns = self._texts(fields)
        spans = self._spans(turns, turns[:1], self.options.system_message)
        return Draft(spans, {"text": self._all_text(spans), "filter_flag": True})


class TextConversationTuned(TextConversation):
    """The same in the words of instruction tuning; `roles` has no effect there."""

    name = "sft.text_conversation"
    tuned = True

    @dataclass(frozen=True)
    class Options(_Turns.Options, Prompted):
        """Both."""


class VisualQuestion(_Turns):
    """A conversation about pictures, which stand before or after the first question at random.

    Fields: `image_ids` (a list per picture), and `data` (question and answer in turn) or `instruction`, `inputs`
    (asked instead of the instruction where it is not blank), `outputs`. Options: as `TextConversation`.
    """

    name = "pretrain.visual_question"
    needs = {"image_ids": PICTURES, "data": LIST}

    @classmethod
    def needed(cls, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See `Decoder`: `instruction` and `outputs` may stand for `data`."""
        if fields.get("data") is None and fields.get("outputs") is not None:
            return {"image_ids": PICTURES, "instruction": TEXT, "outputs": TEXT}
        return cls.needs

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if fields.get("image_ids") is None:
            return self.lacking(["image_ids"])
        before = self.tuned or draws.uniform() < 0.5
        if fields.get("data") is not None:
            turns = self._texts(fields)
            if self.tuned:
                turns = [with_full_stop(said.strip()) if place % 2 else said.strip()
                         for place, said in enumerate(turns)]
        elif fields.get("outputs") is not None:
            asked = "inputs" if str(fields.get("inputs") or "").strip() else "instruction"
            turns = [self.text(fields, asked), self.text(fields, "outputs")]
        else:
            return self.lacking(["data", "outputs"])
        pictures: list[Part] = [*self.pictures(fields, draws, read=True)]
        first = [*pictures, *turns[:1]] if before else [*turns[:1], *pictures]
        spans = self._spans(turns, first, "" if self.tuned else self.options.system_message)
        return Draft(spans, {"text": self._all_text(spans), "filter_flag": True})


class VisualQuestionTuned(VisualQuestion):
    """The same in instruction tuning: pictures always first, answers end in a full stop, no system message."""

    name = "sft.visual_question"
    tuned = True

    @dataclass(frozen=True)
    class Options(_Turns.Options, Prompted):
        """Both."""
