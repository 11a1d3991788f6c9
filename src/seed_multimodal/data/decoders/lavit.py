"""LaVIT's unified pre-training and tuning.

    lavit.caption    [image] caption</s>                        image as input; caption and </s> are learned
                     caption[ codes ]                           image as target; codes and ] are learned
                     [ codes ]                                  caption dropped, for classifier-free guidance
    lavit.question   [image] Question: … Answer: answer</s>     answer and </s> are learned
    lavit.compose    codes instruction[ codes ]                 image and instruction to image; last codes and ]

[ and ] are image start and end. Input images are features, target images codes; their number is known only after the
token selector ran on the device, so placeholders are planned here (`training.lavit.rows` replaces them). As at
inference there is no <s>. Plain text: `pretrain.text`. Source: §3 and §5.3 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from seed_multimodal.data.decoders.base import SeededRandom, Segment, SegmentList
from seed_multimodal.data.decoders.seed_x import (
    FeatureDecoder,
    FeatureDecoderOptions,
    ImageSequence,
    OpenedImage,
)
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.lavit.processing import QUESTION, LavitTokenizer
from seed_multimodal.settings import setting

_SEEDS = 2**62
Codes = list[int]


class LavitDecoder(FeatureDecoder):
    """Base of these decoders; plans 3/8 of an image's patches (the token selector aims at a third)."""

    Tokenizer = LavitTokenizer
    interpolation = "bicubic"

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, options)
        self.start, self.end = self.vocabulary.boi_id, self.vocabulary.eoi_id
        patches = self.vocabulary.tokens_per_image
        self.code_counts = list(range(1, patches + 1))
        self.places = -(-patches * 3 // 8)

    def text(self, fields: Mapping[str, Any], name: str, rng: SeededRandom) -> str:
        """A text of the record, drawn from it if it is a list."""
        several = isinstance(fields.get(name), list)
        return self.filled(
            {name: rng.choice(self.choices(fields, name))} if several else fields, name
        ).strip()

    def seen(
        self, fields: Mapping[str, Any], name: str, rng: SeededRandom, written: bool
    ) -> OpenedImage:
        """The opened image of a field, with a seed for the selection of its patches."""
        return OpenedImage(
            self.need(fields, name, Image.Image), None, written, rng.randint(0, _SEEDS)
        )

    def drawn(self, fields: Mapping[str, Any], name: str, rng: SeededRandom) -> OpenedImage | Codes:
        """An image as codes: those under `NAME_ids`, else computed from the image."""
        ids = f"{name}_ids"
        return (
            self.codes(fields[ids], ids)
            if fields.get(ids) is not None
            else self.seen(fields, name, rng, True)
        )

    def written(self, image: OpenedImage | Codes) -> list[Segment]:
        """A target image: its start token has no loss, codes and end have."""
        return [Segment([self.start], learned=False), Segment([image, self.end])]

    def _fill(self, sequence: ImageSequence, segmented: SegmentList) -> None:
        for segment in segmented.segments:
            for part in segment.parts:
                image = part if isinstance(part, OpenedImage) else None
                if image is not None:
                    ids = [self.vocabulary.code_start] * self.places
                elif isinstance(part, int):
                    ids = [part]
                else:
                    codes = not isinstance(part, str)
                    ids = (
                        self.vocabulary.code_to_id(part)
                        if codes
                        else self.tokenizer.encode_parts([part])
                    )
                self.add(
                    sequence, ids, ids if segment.learned else [IGNORE_INDEX] * len(ids), image
                )
        if sequence.ids[-1] != self.end:  # no `</s>` after an image
            self.add(sequence, [self.tokenizer.eos_id], [self.tokenizer.eos_id])


class Caption(LavitDecoder):
    """An image and its caption, either first: `text` and `image` or `image_ids` (its codes, only as a target).

    `img_first_ratio`: share of samples with the caption as target. `text_dropout`: share of the others without caption,
    for classifier-free guidance.
    """

    name = "lavit.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        img_first_ratio: float = setting(0.5, minimum=0, maximum=1)
        text_dropout: float = setting(0.1, minimum=0, maximum=1)

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        text = self.text(fields, "text", rng)
        reads = rng.uniform() < self.options.img_first_ratio
        dropped = rng.uniform() < self.options.text_dropout
        if reads and (fields.get("image") is not None or fields.get("image_ids") is None):
            shown = [self.start, self.seen(fields, "image", rng, False), self.end]
            return SegmentList([Segment(shown, learned=False), Segment([text])], {"text": text})
        before = [] if dropped else [Segment([text], learned=False)]
        return SegmentList(
            [*before, *self.written(self.drawn(fields, "image", rng))], {"text": text}
        )


class Question(LavitDecoder):
    """An image, a question and its answer: `image`, `question`, `answer`. `prompt`: has `{}` for the question."""

    name = "lavit.question"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        prompt: str = QUESTION

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        asked = self.options.prompt.replace("{}", self.text(fields, "question", rng))
        answer = self.text(fields, "answer", rng)
        shown = [self.start, self.seen(fields, "image", rng, False), self.end, asked]
        return SegmentList([Segment(shown, learned=False), Segment([answer])], {"text": answer})


class Compose(LavitDecoder):
    """An edited image: `source_image`, `target_image` (or their codes, `source_image_ids`, `target_image_ids`),
    `instruction`. `text_dropout`: as in `Caption`, for both image and instruction."""

    name = "lavit.compose"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        text_dropout: float = setting(0.1, minimum=0, maximum=1)

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        text = self.text(fields, "instruction", rng)
        given = Segment([self.drawn(fields, "source_image", rng), text], learned=False)
        before = [] if rng.uniform() < self.options.text_dropout else [given]
        return SegmentList(
            [*before, *self.written(self.drawn(fields, "target_image", rng))], {"text": text}
        )
