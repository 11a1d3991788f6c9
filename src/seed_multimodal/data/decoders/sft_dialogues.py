"""Decoders of instruction tuning whose questions and answers come from a language model: dialogues and clips.

    <s>USER: [picture]question\\nASSISTANT:answer\\nUSER: question\\nASSISTANT:answer</s>
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import PICTURE, PICTURES, TEXT, Draft, Part, Span
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.data.decoders.sft import NO_DIALOGUE, Tuned
from seed_multimodal.data.decoders.turns import with_full_stop
from seed_multimodal.data.formats.record import BadRecord


class Conversation(Tuned):
    """Questions and answers about one picture.

    Fields: `image_ids` (or `views`), `question` ("Question: … Question: …"), `answer` ("Answer: … Answer: …").
    """

    name = "sft.conversation"
    needs = {"image_ids": PICTURE, "question": TEXT, "answer": TEXT}

    @classmethod
    def fits(cls, fields: Mapping[str, Any], several: bool | None) -> bool:
        """See `Decoder`: texts with the markers, about one picture."""
        return (not cls.missing(fields) and not several and "Question: " in str(fields["question"])
                and "Answer: " in str(fields["answer"]))

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        asked, said = self.marked(fields, "question", "Question: "), self.marked(fields, "answer", "Answer: ")
        if phrases.NO_DIALOGUE in fields["question"]:
            return Draft(dropped=NO_DIALOGUE if self.validate else "")
        pictures: list[Part] = self.question_pictures(fields, draws)
        spans: list[Span] = []
        for question, answer in zip(asked, said, strict=False):
            spans += [self.user(*pictures, question, first=not spans), Span([self.learned_answer(answer)])]
            pictures = []
        return Draft(spans)

    def marked(self, fields: Mapping[str, Any], name: str, marker: str) -> list[str]:
        """What follows each marker; validation refuses a text without one."""
        value = self.text(fields, name)
        found = [piece.strip() for piece in value.split(marker)[1:]]
        if self.validate and not found:
            raise BadRecord("no markers", f"{name}: has no {marker.strip()!r} marker, so there is no turn in it.")
        return found

    def question_pictures(self, fields: Mapping[str, Any], draws: Draws) -> list[Part]:
        """The pictures of the first question."""
        return [self.picture(fields, draws, read=True)]

    def learned_answer(self, answer: str) -> str:
        """An answer as it is learned."""
        return with_full_stop(answer)


class VideoConversation(Conversation):
    """Questions and answers about a clip; there must be as many of the ones as of the others.

    Fields: as `Conversation`, `image_ids` being the frames one after the other.
    """

    name = "sft.video_conversation"
    needs = {"image_ids": PICTURES, "question": TEXT, "answer": TEXT}

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        asked, said = self.marked(fields, "question", "Question: "), self.marked(fields, "answer", "Answer: ")
        if len(asked) != len(said):
            raise BadRecord("turns", f"answer: holds {len(said)} answers to {len(asked)} questions.")
        return super().draft(fields, draws)

    def question_pictures(self, fields: Mapping[str, Any], draws: Draws) -> list[Part]:
        """The frames."""
        return [*self.pictures(fields, draws, read=True)]

    def learned_answer(self, answer: str) -> str:
        """Answers stay as they are here."""
        return answer


class Video(Tuned):
    """A question about a clip. Fields: `image_ids` (frames one after the other), `question`, `answer`."""

    name = "sft.video"
    needs = {"image_ids": PICTURES, "question": TEXT, "answer": TEXT}

    @classmethod
    def fits(cls, fields: Mapping[str, Any], several: bool | None) -> bool:
        """See `Decoder`: several pictures."""
        return not cls.missing(fields) and several is True

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        frames = self.pictures(fields, draws, read=True)
        if self.validate and not frames:
            raise BadRecord("number of frames", "image_ids: holds no frame.")
        question = self.text(fields, "question").strip()
        answer = self.answer(fields, "answer").replace(phrases.VIDEO_ARTEFACT, "").strip()
        return Draft([self.user(*frames, question, first=True), Span([with_full_stop(answer)])])
