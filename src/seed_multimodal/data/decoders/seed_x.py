"""Decoders of SEED-X's instruction tuning: conversations about a picture, captions to draw from, edits; and ours, any
conversation with pictures on both sides (edits of several turns).

    seed_x.conversation   <s>[INST] [picture]question [/INST]\\nanswer\\n[INST] question [/INST]\\nanswer</s>
    seed_x.caption        <s>[INST] request caption [/INST]\\n response[drawn]</s>     of it only [drawn] is learned
    seed_x.edit           <s>[INST] [source]instruction [/INST]\\nresponse[drawn]</s>
    seed_x.chat           <s>[INST] … [/INST]\\nanswer[drawn]\\n[INST] [shown again]… [/INST]\\nanswer[drawn]</s>

Each turn is tokenised on its own; answers, the `<img>` of drawn pictures and the final `</s>` are learned. Pictures:
`pictured`. Source: SEED-X's released code (`sft_clm.py`, `image_text_pairs_clm.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import LIST, TEXT, Draft, Span
from seed_multimodal.data.decoders.opened import PictureSequence, UsedPicture
from seed_multimodal.data.decoders.pictured import INSTRUCTION, PictureDecoder, PictureOptions
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import ROLES
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.settings import setting

SIMILARITIES = ("all_similarities", "similarity", "score", "SCORE")  # of caption and picture, in the record's json


class Conversation(PictureDecoder):
    """A conversation with a picture (at `<image>`, else before or after the first question at random) or none.

    Fields: `data` (question and answer in turn), `image` (opened; absent, null, "" or "none": no picture).

    Options:
        turn_sep: before every further question. Over-long conversations are cut on the right, as released.
    """

    name = "seed_x.conversation"
    needs = {"data": LIST}
    without_effect = ("min_resolution", "min_aspect_ratio")

    @dataclass(frozen=True)
    class Options(PictureOptions):
        turn_sep: str = "\n"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if fields.get("data") is None:
            return self.lacking(["data"])
        turns = self.list_of(fields, "data")
        wrong = next((place for place, said in enumerate(turns) if not isinstance(said, str)), None)
        if wrong is not None:
            raise BadRecord("wrong type", f"data[{wrong}]: must be a text, not {shorten(turns[wrong])}.")
        if self.validate and (not turns or len(turns) % 2):
            raise BadRecord("wrong role", f"data: holds {len(turns)} texts; questions and answers come in pairs.")
        shown = None if self.no_picture(fields.get("image")) else self.use(fields, "image")
        before = draws.uniform() < 0.5
        asks = range(0, len(turns), 2)
        shows = next((place for place in asks if self.validate and PLACEHOLDER in turns[place]), 0)
        spans = self.system()
        for place, text in enumerate(turns):
            name = f"data[{place}]"
            if place % 2:
                spans.append(Span([self.said(text, name)]))
            else:
                content = self.asked(text, name, shown if place == shows else None, before)
                spans.append(self.instruct(*content, opening=self.options.turn_sep if place else ""))
        return Draft(spans, {"text": "".join(self.as_text(span.parts) for span in spans)})


class Edit(PictureDecoder):
    """A picture (placed as a conversation's) and what to change, answered with a sentence and the changed picture.

    Fields: `source_image`, `target_image` (opened), `instruction`; `instruction_new` and `response` replace both texts.

    Options:
        min_resolution, min_aspect_ratio: of the source.
        prompt_drop_ratio: share of samples without the instruction. use_polite_response: answer with a sentence first.
    """

    name = "seed_x.edit"
    needs = {"source_image": "picture", "target_image": "picture", "instruction": TEXT}

    @dataclass(frozen=True)
    class Options(PictureOptions):
        prompt_drop_ratio: float = setting(0.0, least=0, most=1)
        use_polite_response: bool = True

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        names = ("source_image", "target_image")
        missing = [name for name in names if fields.get(name) is None]
        if missing:
            return self.lacking(missing)
        source, target = self.use(fields, names[0]), self.use(fields, names[1], written=True)
        reason = self.misshapen(source, names[0])
        if reason:
            return Draft(dropped=reason)
        given = fields.get("instruction_new") is not None and fields.get("response") is not None
        name = "instruction_new" if given else "instruction"
        response = self.said(self.text(fields, "response"), "response") if given else (
            draws.choice(phrases.SEEDX_EDIT_RESPONSES))
        response = response if given or self.options.use_polite_response else ""
        dropped = draws.uniform() < self.options.prompt_drop_ratio
        before = draws.uniform() < 0.5
        content = self.asked(self._instruction(fields, name), name, source, before)
        asked = self.asked("", name, source, before) if dropped else content
        answer: list[Any] = [response, target]
        spans = [*self.system(), self.instruct(*asked), Span(answer)]
        return Draft(spans, {"text": "".join(self.as_text(span.parts) for span in spans)})

    def _instruction(self, fields: Mapping[str, Any], name: str) -> str:
        if fields.get(name) is None and not self.validate:
            return ""
        found = self.text(fields, name)
        if self.validate and not found.replace(PLACEHOLDER, "").strip():
            raise BadRecord("empty text", f"{name}: is empty.")
        return found

    def limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        """Never cut: an over-long sample is dropped, as released."""
        if max_length is not None and len(sequence) >= max_length:
            sequence.dropped = f"not fewer than {max_length} tokens"


class Caption(PictureDecoder):
    """A picture and its caption: the picture is drawn from it or, at random, read and described.

    Fields: `image` (opened), `text` (or what `use_caption_in_metadata` names), optional similarities.

    Options:
        img_first_ratio: share of samples that describe; below 0 none.
        add_gen_prompt: ask for the picture with one of 28 requests.
        similarity_thr: leave out pairs below it (of records that have one of `SIMILARITIES`).
        use_caption_in_metadata, caption_key_in_metadata: the caption's key, beside `text` or in `metadata`.

    A caption too long to draw from leaves the sample out, counted. Note: without `validate` it becomes a sample that
    reads the picture and learns the whole request, as released.
    """

    name = "seed_x.caption"
    needs = {"image": "picture", "text": TEXT}
    without_effect = ("assure_text",)

    @dataclass(frozen=True)
    class Options(PictureOptions):
        img_first_ratio: float = setting(0.5, least=-1, most=1)
        add_gen_prompt: bool = False
        similarity_thr: float | None = None
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`; the text, then the picture."""
        picture = self.use(fields, "image")
        unlike = dissimilar(fields, self.options.similarity_thr)
        reason = self.misshapen(picture, "image") or unlike
        if reason:
            return Draft(dropped=reason)
        caption = self._caption(fields)
        if self.options.add_gen_prompt:
            request, response = draws_pair(draws)
            asked = self.options.instruction_prompt.replace(INSTRUCTION, f"{request} {caption.lstrip()}")
            caption = f"{asked} {response}"
        parts: list[Any] = [caption, picture]
        return Draft([Span(parts)], {"text": caption},
                     image_first=draws.uniform() < self.options.img_first_ratio)

    def _caption(self, fields: Mapping[str, Any]) -> str:
        name = self.options.caption_key_in_metadata if self.options.use_caption_in_metadata else "text"
        metadata = metadata_of(fields) if self.options.use_caption_in_metadata else {}
        found = self.said(self.text({**metadata, **fields}, name), name)
        if self.validate and not found.strip(phrases.BLANK_CAPTION):
            raise BadRecord("empty text", f"{name}: is empty.")
        return found

    def decode(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> PictureSequence:
        """See `Decoder`."""
        draft = self.draft(fields, draws)
        sequence = PictureSequence([], [], draft.extra, draft.dropped)
        if draft.dropped:
            return sequence
        parts: list[Any] = list(draft.spans[0].parts)
        text, picture = parts
        ids = self.tokenizer.encode(text)
        longest = len(ids) + (self.tokens_in + 2) * picture.views + 2
        too_long = max_length is not None and longest > max_length and not draft.image_first
        if too_long and self.validate:
            if len(ids) + self.tokens_out + 4 > (max_length or 0):
                sequence.dropped = f"the caption is too long to draw from within {max_length} tokens"
                return sequence
            too_long = False  # what is written takes one view
        if draft.image_first or too_long:
            span = Span(parts[::-1])
        else:
            span = Span([text, replace(picture, written=True)], learned=False)
        self._fill(sequence, Draft([span]), None)
        self.limit(sequence, max_length)
        return sequence


def draws_pair(draws: Draws) -> tuple[str, str]:
    """A request for a picture and the response to it."""
    number = draws.randint(0, len(phrases.SEEDX_DRAW_REQUESTS) - 1)
    return phrases.SEEDX_DRAW_REQUESTS[number], phrases.SEEDX_DRAW_RESPONSES[number]


def metadata_of(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object under `metadata`, which may be json text; empty without one."""
    value = fields.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord("malformed json", f"metadata: is not json: {shorten(value)}.") from None
    return value if isinstance(value, Mapping) else {}


def dissimilar(fields: Mapping[str, Any], threshold: float | None) -> str:
    """Why a pair is left out by the similarity of caption and picture; empty if it is not, or none is known."""
    if threshold is None:
        return ""
    known = {**metadata_of(fields), **fields}
    name = next((name for name in SIMILARITIES if known.get(name) is not None), None)
    if name is None:
        return ""
    values = known[name] if isinstance(known[name], list | tuple) and known[name] else [known[name]]
    if not all(isinstance(value, int | float) for value in values):
        raise BadRecord("wrong type", f"{name}: must be a number or a list of numbers, not {shorten(known[name])}.")
    return f"{name} is below {threshold:g}" if max(values) < threshold else ""


class Chat(PictureDecoder):
    """Any conversation with pictures on both sides, of our records (`data.formats.conversations`).

    Fields: `messages`, the pictures of their contents opened (`{"image": picture}`); `system`.

    A picture of an answer is drawn. Where the next message brings none, the drawn one is shown again in front of it
    (`show_drawn`), so that several edits follow each other as single ones do.
    """

    name = "seed_x.chat"
    needs = {"messages": LIST}
    without_effect = ("min_resolution", "min_aspect_ratio")

    def picture_fields(self, fields: Mapping[str, Any]) -> list[str]:
        """None: its pictures stand in the messages."""
        return []

    @dataclass(frozen=True)
    class Options(PictureOptions):
        turn_sep: str = "\n"
        show_drawn: bool = True

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        spans: list[Span] = self.system()
        drawn: Any = None
        messages = self.list_of(fields, "messages")
        for place, message in enumerate(messages):
            where = f"messages[{place}]"
            if not isinstance(message, Mapping) or message.get("role") != ROLES[place % 2]:
                raise BadRecord("wrong role", f"{where}: must be the {ROLES[place % 2]}'s turn.")
            content = message.get("content")
            parts = self._parts([content] if isinstance(content, str) else content, where, written=bool(place % 2))
            pictures = [part for part in parts if isinstance(part, UsedPicture)]
            if place % 2:
                spans.append(Span(parts))
                drawn = pictures[-1].picture if pictures else drawn
                continue
            if drawn is not None and not pictures and self.options.show_drawn:
                parts = [self.use_picture(drawn, where), *parts]
            drawn = None
            spans.append(self.instruct(*parts, opening=self.options.turn_sep if place else ""))
        if not messages or len(messages) % 2:
            raise BadRecord("wrong role", "messages: the conversation ends without an answer.")
        return Draft(spans, {"text": "".join(self.as_text(span.parts) for span in spans)})

    def _parts(self, content: Any, where: str, written: bool) -> list[Any]:
        if not isinstance(content, Sequence):
            raise BadRecord("wrong type", f"{where}.content: must be a text or a list, not {shorten(content)}.")
        parts: list[Any] = []
        for place, part in enumerate(content):
            name = f"{where}.content[{place}]"
            if isinstance(part, str):
                parts.append(self.said(part, name))
            elif isinstance(part, Mapping) and part.get("image") is not None:
                parts.append(self.use_picture(part["image"], name, written))
            else:
                raise BadRecord("wrong type", f"{name}: must be a text or a picture, not {shorten(part)}.")
        return parts
