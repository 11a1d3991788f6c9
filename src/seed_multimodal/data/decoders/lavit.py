"""LaVIT's unified pre-training, and what its model is tuned with.

    lavit.caption    [image] caption</s>                        the image is read; its caption and </s> are learned
                     caption[ codes ]                           the image is written; codes and ] are learned
                     [ codes ]                                  the caption was dropped: the context for guidance
    lavit.question   [image] Question: … Answer: answer</s>     answer and </s> are learned
    lavit.compose    codes instruction[ codes ]                 an image and words to an image; the last codes and ]

[ and ] are image start and end. An image is read as features and written as codes, as many as the token selector keeps:
that is known on the device only, so places are planned for it here (`training.lavit.rows` puts in the kept ones). There
is no <s>, as at inference. Plain text: `pretrain.text`. Source: the paper's §3, §5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from seed_multimodal.data.decoders.base import IGNORED, Draft, SeededDraws, Segment
from seed_multimodal.data.decoders.seed_x import OpenedDecoder, OpenedOptions, PictureSequence, UsedPicture
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.lavit.processing import QUESTION, LavitTokenizer
from seed_multimodal.settings import setting

_SEEDS = 2**62
Codes = list[int]


class LavitDecoder(OpenedDecoder):
    """Base of these decoders; for an image 3/8 of its patches are planned (the selector aims at a third)."""

    Words = LavitTokenizer
    interpolation = "bicubic"

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, options)
        self.start, self.end = self.vocabulary.boi_id, self.vocabulary.eoi_id
        patches = self.vocabulary.tokens_per_image
        self.code_counts = list(range(1, patches + 1))
        self.places = -(-patches * 3 // 8)

    def text(self, fields: Mapping[str, Any], name: str, draws: SeededDraws) -> str:
        """A text of the record; of a list, one of them."""
        several = isinstance(fields.get(name), list)
        return self.filled({name: draws.choice(self.texts(fields, name))} if several else fields, name).strip()

    def seen(self, fields: Mapping[str, Any], name: str, draws: SeededDraws, written: bool) -> UsedPicture:
        """The opened image of a field; which of its patches are kept depends on a seed of its own."""
        return UsedPicture(self.need(fields, name, Image.Image), None, written, draws.randint(0, _SEEDS))

    def drawn(self, fields: Mapping[str, Any], name: str, draws: SeededDraws) -> UsedPicture | Codes:
        """An image as codes: those of the record under `NAME_ids`, else to be made from the image."""
        ids = f"{name}_ids"
        return self.codes(fields[ids], ids) if fields.get(ids) is not None else self.seen(fields, name, draws, True)

    def written(self, image: UsedPicture | Codes) -> list[Segment]:
        """An image that is learned: its start is given, codes and end are not."""
        return [Segment([self.start], learned=False), Segment([image, self.end])]

    def _fill(self, sequence: PictureSequence, draft: Draft) -> None:
        for segment in draft.segments:
            for part in segment.parts:
                image = part if isinstance(part, UsedPicture) else None
                if image is not None:
                    ids = [self.vocabulary.code_start] * self.places
                elif isinstance(part, int):
                    ids = [part]
                else:
                    codes = not isinstance(part, str)
                    ids = self.vocabulary.code_to_id(part) if codes else self.tokenizer.encode_parts([part])
                self.add(sequence, ids, ids if segment.learned else [IGNORED] * len(ids), image)
        if sequence.ids[-1] != self.end:  # no `</s>` behind an image
            self.add(sequence, [self.tokenizer.eos_id], [self.tokenizer.eos_id])


class Caption(LavitDecoder):
    """An image and its caption, either first: `text` and `image` or `image_ids` (its codes, which are written only).

    `img_first_ratio`: share of samples that read the image and learn the caption. `text_dropout`: share of the others
    without their caption, so that generation can be guided.
    """

    name = "lavit.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(OpenedOptions):
        img_first_ratio: float = setting(0.5, least=0, most=1)
        text_dropout: float = setting(0.1, least=0, most=1)

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        text = self.text(fields, "text", draws)
        reads = draws.uniform() < self.options.img_first_ratio
        dropped = draws.uniform() < self.options.text_dropout
        if reads and (fields.get("image") is not None or fields.get("image_ids") is None):
            shown = [self.start, self.seen(fields, "image", draws, False), self.end]
            return Draft([Segment(shown, learned=False), Segment([text])], {"text": text})
        before = [] if dropped else [Segment([text], learned=False)]
        return Draft([*before, *self.written(self.drawn(fields, "image", draws))], {"text": text})


class Question(LavitDecoder):
    """An image, a question and its answer: `image`, `question`, `answer`. `prompt`: with `{}` for the question."""

    name = "lavit.question"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(OpenedOptions):
        prompt: str = QUESTION

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        asked = self.options.prompt.replace("{}", self.text(fields, "question", draws))
        answer = self.text(fields, "answer", draws)
        shown = [self.start, self.seen(fields, "image", draws, False), self.end, asked]
        return Draft([Segment(shown, learned=False), Segment([answer])], {"text": answer})


class Compose(LavitDecoder):
    """An image as codes and words, made into another image: `source_image`, `target_image` (or the codes of each,
    `source_image_ids`, `target_image_ids`), `instruction`. `text_dropout`: as of a caption; image and words are left
    out."""

    name = "lavit.compose"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(OpenedOptions):
        text_dropout: float = setting(0.1, least=0, most=1)

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        text = self.text(fields, "instruction", draws)
        given = Segment([self.drawn(fields, "source_image", draws), text], learned=False)
        before = [] if draws.uniform() < self.options.text_dropout else [given]
        return Draft([*before, *self.written(self.drawn(fields, "target_image", draws))], {"text": text})
