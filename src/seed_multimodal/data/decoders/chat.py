"""Our general decoder: `messages` → a dialogue in a prompt template, as at inference.

    <s>USER: [image]question\\nASSISTANT:answer[image]\\nUSER: question\\nASSISTANT:answer</s>

Learned are the answers, each up to the words that open the user's next turn (there a system stops), the last one to
`</s>`. Names of control words in the texts are ordinary letters, as in every prompt of ours. White space next to an
image goes, but for the end of a prompt before a learned answer: the prompt is there before the answer is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders.base import IGNORED, Decoder, DecoderOptions, Draft, Draws, Part, Segment
from seed_multimodal.data.formats.conversations import with_pictures
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import ROLES, TEMPLATES, get_template
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.settings import setting


class Chat(Decoder):
    """A conversation of texts and images: `messages` (see `data.formats.conversations`); `system`, before everything;
    `image_ids`, the codes of the images that `<image>` stands for in the texts.

    `answers`: which are learned: "every" one; the "last" one; or "one" that is drawn, where the dialogue ends.
    `system_message`: put before everything in records without `system`.
    """

    name = "chat"

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        template: str = setting("vicuna", choices=tuple(TEMPLATES))
        answers: str = setting("every", choices=("every", "last", "one"))
        system_message: str = ""

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """Segments of the template, each one part."""
        turns = self._turns(fields)
        answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        if self.options.answers == "one":
            turns = turns[:draws.choice(answers) + 1]
        learned = set(answers) if self.options.answers == "every" else {len(turns) - 1}
        rendered = [(role, [self._part(part, f"messages[{place}].content[{number}]", draws, place not in learned)
                            for number, part in enumerate(content)]) for place, (role, content) in enumerate(turns)]
        template, system = get_template(self.options.template), fields.get("system") or self.options.system_message
        segments: list[Segment] = []
        for place in range(len(rendered)):  # a shorter dialogue's parts begin a longer one's
            parts = template.render(rendered[:place + 1], system)
            segments += [Segment([part], learned=place in learned) for part in parts[len(segments):]]
        return Draft(segments)

    def join(self, draft: Draft) -> tuple[list[int], list[int]]:
        """See `Decoder`; the marker of the user's next turn is learned behind an answer."""
        segments = draft.segments
        marker = self.tokenizer.encode_parts([get_template(self.options.template).turn_marker], strip=False)
        ids, labels = [self.tokenizer.bos_id], [IGNORED]
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
            ends = previous and previous.learned and not segment.learned and piece[:len(marker)] == marker
            learned = len(piece) if segment.learned else len(marker) if ends else 0
            labels += piece[:learned] + [IGNORED] * (len(piece) - learned)
        return [*ids, self.tokenizer.eos_id], [*labels, self.tokenizer.eos_id]

    def _turns(self, fields: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
        turns: list[tuple[str, list[Any]]] = []
        for place, message in enumerate(self.need(fields, "messages", list)):
            if message.get("role") != ROLES[place % 2]:
                raise BadRecord("wrong role", f"messages[{place}]: must be the {ROLES[place % 2]}'s turn.")
            name = f"messages[{place}].content"
            content: Any = self.need({name: message.get("content")}, name, object)
            turns.append((message["role"], [content] if isinstance(content, str) else list(content)))
        if not turns or len(turns) % 2:
            raise BadRecord("wrong role", "messages: the conversation ends without an answer.")
        self._put_in(fields, turns)
        return turns

    def _put_in(self, fields: Mapping[str, Any], turns: Sequence[tuple[str, list[Any]]]) -> None:
        """Each `<image>` of the texts becomes an image of `image_ids`."""
        texts = [part for _, content in turns for part in content if isinstance(part, str)]
        places = sum(part.count(PLACEHOLDER) for part in texts)
        # Images inside the messages may be listed in `image_ids` as well; then there is no placeholder.
        inside = any(not isinstance(part, str) for _, content in turns for part in content)
        codes = [] if inside and not places else fields.get("image_ids") or []
        if codes and not isinstance(codes[0], list):
            size = self.vocabulary.tokens_per_image
            codes = [codes[start:start + size] for start in range(0, len(codes), size)]
        if places != len(codes):
            raise BadRecord("images and placeholders",
                            f"messages: {places} {PLACEHOLDER} placeholders for {len(codes)} images in image_ids.")
        left = iter([{"codes": one} for one in codes])
        for _, content in turns:
            if any(isinstance(part, str) and PLACEHOLDER in part for part in content):
                content[:] = with_pictures(content, left)

    def _part(self, part: Any, name: str, draws: Draws, read: bool) -> Part:
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping) or not part.get("codes"):
            raise BadRecord("not tokenised", f"{name}: must be a text or an image with codes, not {shorten(part)}; "
                                             "tokenise the data first.")
        codes = part["codes"]
        return self.one_view(codes if isinstance(codes[0], list) else [codes], f"{name}.codes", draws, read=read)
