"""Our general decoder: `messages` -> a dialogue in a prompt template, as at inference.

    <s>USER: [picture]question\\nASSISTANT:answer[picture]\\nUSER: question\\nASSISTANT:answer</s>

Learned are the answers, each up to the words that open the user's next turn (there a system stops), the last one to
`</s>`. Names of control words in the texts are ordinary letters, as in every prompt of ours. White space next to a
picture goes, but for the end of a prompt before a learned answer: the prompt is there before the answer is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders.base import LIST, Decoder, DecoderOptions, Draft, Part, Span
from seed_multimodal.data.decoders.sequence import IGNORED, Draws, TokenSequence
from seed_multimodal.data.formats.conversations import with_pictures
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import ROLES, TEMPLATES, get_template
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.settings import setting

ANSWERS = ("every", "last", "one")
Turn = tuple[str, list[Any]]


class Chat(Decoder):
    """A conversation of texts and pictures.

    Fields: `messages` (see `data.formats.conversations`); `system`, said before everything; `image_ids`, the codes of
    the pictures that `<image>` stands for in the texts, where there are such.

    Options:
        template: vicuna, llama2 or plain.
        answers: which are learned: "every" one; the "last" one; or "one" that is drawn, where the dialogue ends.
        system_message: put before everything in records without `system`.
    """

    name = "chat"
    needs = {"messages": LIST}

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        template: str = setting("vicuna", choices=tuple(TEMPLATES))
        answers: str = setting("every", choices=ANSWERS)
        system_message: str = ""

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """Spans of the template, each one part. Raises as `Decoder.__call__`."""
        turns = self._turns(fields)
        answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        if self.options.answers == "one" and answers:
            turns = turns[:draws.choice(answers) + 1]
        learned = set(answers) if self.options.answers == "every" else {len(turns) - 1}
        said: list[tuple[str, list[Part]]] = []
        for place, (role, content) in enumerate(turns):
            read = place not in learned
            said.append((role, [self._part(part, f"messages[{place}].content[{number}]", draws, read)
                                for number, part in enumerate(content)]))
        template, system = get_template(self.options.template), fields.get("system") or self.options.system_message
        if not isinstance(system, str):
            raise BadRecord("wrong type", f"system: must be a text, not {shorten(system)}.")
        spans: list[Span] = []
        for place in range(len(said)):  # a shorter dialogue's parts begin a longer one's
            parts = template.render(said[:place + 1], system)
            spans += [Span([part], learned=place in learned) for part in parts[len(spans):]]
        return Draft(spans)

    def _fill(self, sequence: TokenSequence, draft: Draft, max_length: int | None) -> None:
        parts = [span.parts[0] for span in draft.spans]
        marker = self.tokenizer.encode_parts([get_template(self.options.template).turn_marker], strip=False)
        ids, labels = [self.tokenizer.bos_id], [IGNORED]
        for place, span in enumerate(draft.spans):
            part = parts[place]
            if isinstance(part, str):
                before = place and not isinstance(parts[place - 1], str)
                after = place + 1 < len(parts) and not isinstance(parts[place + 1], str)
                if after and draft.spans[place + 1].learned and not span.learned:
                    after = False
                part = part.lstrip() if before else part
                part = part.rstrip() if after else part
            piece = self.tokenizer.encode_parts([part], strip=False) if isinstance(part, str) else self.encode([part])
            ids += piece
            ends = place and draft.spans[place - 1].learned and not span.learned and piece[:len(marker)] == marker
            learned = len(piece) if span.learned else len(marker) if ends else 0
            labels += piece[:learned] + [IGNORED] * (len(piece) - learned)
        ids.append(self.tokenizer.eos_id)
        labels.append(self.tokenizer.eos_id)
        sequence.ids, sequence.labels = ids[:max_length], labels[:max_length]

    # ------------------------------------------------------------------------------------------ the messages

    def _turns(self, fields: Mapping[str, Any]) -> list[Turn]:
        turns: list[Turn] = []
        for place, message in enumerate(self.list_of(fields, "messages")):
            name = f"messages[{place}]"
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise BadRecord("missing key", f"{name}: must be an object with role and content.")
            if message["role"] not in ROLES:
                raise BadRecord("wrong role", f"{name}: the role {shorten(message['role'])} is not user or assistant.")
            content = message["content"]
            if not isinstance(content, str | list | tuple):
                raise BadRecord("wrong type", f"{name}.content: must be a text or a list, not {shorten(content)}.")
            turns.append((message["role"], [content] if isinstance(content, str) else list(content)))
        self._put_in(fields, turns)
        if self.validate:
            self._check(turns)
        if not turns or turns[-1][0] != "assistant":
            raise BadRecord("wrong role", "messages: the conversation ends without an answer.")
        return turns

    def _check(self, turns: Sequence[Turn]) -> None:
        for place, (role, content) in enumerate(turns):
            if role != ROLES[place % 2]:
                raise BadRecord("wrong role", f"messages[{place}]: is the {role}'s turn, but the {ROLES[place % 2]}'s "
                                              "was due.")
            if not any(part.strip() if isinstance(part, str) else part for part in content):
                raise BadRecord("empty text", f"messages[{place}].content: is empty.")

    def _put_in(self, fields: Mapping[str, Any], turns: Sequence[Turn]) -> None:
        """Each `<image>` of the texts becomes a picture of `image_ids`."""
        texts = [part for _, content in turns for part in content if isinstance(part, str)]
        places = sum(part.count(PLACEHOLDER) for part in texts)
        # Pictures that stand in the messages may be listed beside them as well; then there is no placeholder.
        inside = any(not isinstance(part, str) for _, content in turns for part in content)
        given = [] if inside and not places else self._given(fields, places)
        if places != len(given):
            raise BadRecord("images and placeholders",
                            f"messages: {places} {PLACEHOLDER} placeholders for {len(given)} pictures in image_ids.")
        left = iter(given)
        for _, content in turns:
            if any(isinstance(part, str) and PLACEHOLDER in part for part in content):
                content[:] = with_pictures(content, left)

    def _given(self, fields: Mapping[str, Any], places: int) -> list[Any]:
        if fields.get("image_ids") is None:
            return []
        value = self.list_of(fields, "image_ids")
        if not value or isinstance(value[0], list | tuple):
            return [{"codes": codes} for codes in value]
        size = self.vocabulary.tokens_per_image if places != 1 else max(1, len(value))
        return [{"codes": value[start:start + size]} for start in range(0, len(value), size)]

    def _part(self, part: Any, name: str, draws: Draws, read: bool) -> Part:
        if isinstance(part, str):
            return part
        if isinstance(part, Mapping) and part.get("codes") is not None:
            codes = part["codes"]
            several = isinstance(codes, list | tuple) and bool(codes) and isinstance(codes[0], list | tuple)
            return self.one_view(codes if several else [codes], f"{name}.codes", draws, read=read)
        if isinstance(part, Mapping) and part.get("image") is not None:
            raise BadRecord("not tokenised", f"{name}: the picture {shorten(part['image'])} has no codes yet; tokenise "
                                             "the data first.")
        raise BadRecord("wrong type", f"{name}: must be a text or a picture with codes, not {shorten(part)}.")
