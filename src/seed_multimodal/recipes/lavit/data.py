"""LaVIT's unified pre-training and tuning.

    lavit.caption    [image] caption</s>                        image as input
                     caption[ codes ]                           image as target
                     [ codes ]                                  without the caption, for guidance
    lavit.question   [image] Question: … Answer: answer</s>
    lavit.compose    codes instruction[ codes ]                 image and instruction to image

[ and ] are image start and end. Learned are captions and answers with `</s>`, codes of targets
with ]. Input images are features, target images codes. Their number is known only after the
token selector ran on the device, so placeholders are planned here (`train_rows` replaces
them). As at inference there is no <s>. Plain text: `pretrain.text`. Source: §3 and §5.3 of the
paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from seed_multimodal.data.decoders.base import (
    Codes,
    OptionValues,
    SeededRandom,
    Segment,
    SegmentList,
)
from seed_multimodal.data.decoders.features import (
    FeatureDecoder,
    FeatureDecoderOptions,
    OpenedImage,
)
from seed_multimodal.data.formats.record import RecordFields
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import Ids
from seed_multimodal.models.lavit.processing import QUESTION, load_lavit_tokenizer
from seed_multimodal.settings import fraction

MAX_SEED = 2**62


class LavitDecoder(FeatureDecoder):
    """Base of these decoders."""

    has_start = False
    has_plain_texts = True

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        super().__init__(tokenizer, options)
        self.start = Ids([self.vocabulary.boi_id])
        self.end = Ids([self.vocabulary.eoi_id])
        n_patches = self.vocabulary.tokens_per_image
        # Placeholders of an image: 3/8 of its patches (the token selector aims at a third).
        self.n_placeholders = -(-n_patches * 3 // 8)

    @staticmethod
    def load_tokenizer(folder: str | Path) -> TextTokenizer:
        return load_lavit_tokenizer(folder)

    def text(self, fields: RecordFields, name: str, rng: SeededRandom) -> str:
        """A text of the record; of a list one is chosen."""
        if isinstance(fields.get(name), list):
            fields = {name: rng.choice(self.choices(fields, name))}
        return self.require_text(fields, name).strip()

    def feature_image(
        self, fields: RecordFields, name: str, rng: SeededRandom, *, is_target: bool
    ) -> OpenedImage:
        """The opened image of a field, with a seed for the selection of its patches."""
        image = self.require(fields, name, Image.Image)
        return OpenedImage(image, grid=None, is_target=is_target, seed=rng.randint(0, MAX_SEED))

    def code_image(self, fields: RecordFields, name: str, rng: SeededRandom) -> OpenedImage | Codes:
        """An image as codes: those under `NAME_ids`, else computed from the image."""
        ids_name = f"{name}_ids"
        if fields.get(ids_name) is not None:
            return self.codes(fields[ids_name], ids_name)
        return self.feature_image(fields, name, rng, is_target=True)

    def target(self, prompt: list[Segment], image: OpenedImage | Codes) -> SegmentList:
        """A target image after a prompt: its start token has no loss, codes and end have; there is
        no `</s>` after it.
        """
        start = Segment([self.start], learned=False)
        answer = Segment([image, self.end])
        return SegmentList([*prompt, start, answer], has_end=False)

    def image_ids(self, image: OpenedImage | Codes) -> list[int]:
        """Codes, or placeholders of an image, without image start and end."""
        if isinstance(image, OpenedImage):
            return [self.vocabulary.code_start] * self.n_placeholders
        return self.vocabulary.code_to_id(image)


class Caption(LavitDecoder):
    """An image and its caption, either first.

    Fields: `text`, and `image` or `image_ids` (its codes, only as a target).
    """

    name = "lavit.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        img_first_ratio: float = fraction(0.5)  # share with the image as input
        # Share of the others that have no caption, for classifier-free guidance.
        text_dropout: float = fraction(0.1)

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        # Two random numbers for each record, also where the second one has no effect.
        text = self.text(fields, "text", rng)
        as_input = rng.uniform() < self.options.img_first_ratio
        drops_text = rng.uniform() < self.options.text_dropout
        has_only_codes = fields.get("image") is None and fields.get("image_ids") is not None
        if as_input and not has_only_codes:
            image = self.feature_image(fields, "image", rng, is_target=False)
            question = Segment([self.start, image, self.end], learned=False)
            return SegmentList([question, Segment([text])])

        # The image is the target.
        prompt = [] if drops_text else [Segment([text], learned=False)]
        return self.target(prompt, self.code_image(fields, "image", rng))


class Question(LavitDecoder):
    """An image, a question and its answer: `image`, `question`, `answer`."""

    name = "lavit.question"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        prompt: str = QUESTION  # has `{}` for the question

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        prompt = self.options.prompt.replace("{}", self.text(fields, "question", rng))
        answer = self.text(fields, "answer", rng)
        image = self.feature_image(fields, "image", rng, is_target=False)
        question = Segment([self.start, image, self.end, prompt], learned=False)
        return SegmentList([question, Segment([answer])])


class Compose(LavitDecoder):
    """An edited image.

    Fields: `source_image` and `target_image`, or their codes under `source_image_ids` and
    `target_image_ids`; `instruction`.
    """

    name = "lavit.compose"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(FeatureDecoderOptions):
        # Share without image and instruction, for classifier-free guidance.
        text_dropout: float = fraction(0.1)

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        text = self.text(fields, "instruction", rng)
        source = self.code_image(fields, "source_image", rng)
        prompt: list[Segment] = []
        if rng.uniform() >= self.options.text_dropout:
            prompt = [Segment([source, text], learned=False)]
        return self.target(prompt, self.code_image(fields, "target_image", rng))
