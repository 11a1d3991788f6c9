"""SEED-LLaMA's pre-training data: captions, interleaved documents, clips, text, edits.

pretrain.caption        <s>[image]caption</s>  or  <s>caption[image]</s>       everything learned
pretrain.interleaved    <s>texts and images in the order of the document</s>   everything learned
pretrain.video          <s>[frame][frame][frame][frame]caption</s>             caption learned
pretrain.text           <s>text</s>                                            everything learned
pretrain.edit           <s>[source]instruction[target]</s>                     target learned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seed_multimodal.data.decoders.base import (
    BLANK_CAPTION,
    Decoder,
    DecoderOptions,
    OptionValues,
    SeededRandom,
    Segment,
    SegmentList,
    SegmentPart,
    metadata_of,
)
from seed_multimodal.data.decoders.phrases import EDIT_PREFIX
from seed_multimodal.data.formats.record import BadRecord, RecordFields, as_list
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.settings import fraction, positive, setting


def blank_problem(text: str) -> str:
    """Why a text is dropped, or ""."""
    return "" if text.strip(BLANK_CAPTION) else "the text is blank"


class Caption(Decoder):
    """An image (`image_ids` or `views`) and its caption (`text`, which may be a list)."""

    name = "pretrain.caption"
    learns_all = True
    joins_segments = True

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, minimum=-1, maximum=1)  # share with the image first
        mask_left_label: bool = False  # no loss on the left part
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""
        # Share with the first one of several captions (ours).
        first_text: float = fraction(0.0)
        caption_prompt: str | list[str] | None = None  # templates with `{}` for the caption

    options: Options

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        """Raises ConfigError: as `Decoder`, or a template without a single `{}`."""
        super().__init__(tokenizer, options)
        self.templates = as_list(self.options.caption_prompt or "{}")
        for template in self.templates:
            try:
                template.format("a caption")
            except (LookupError, ValueError):
                raise ConfigError(
                    f"decoder {self.name}: caption_prompt {template!r} must have one {{}} for the "
                    "caption, and no other braces."
                ) from None

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        # The order of the random choices is the original's.
        template = rng.choice(self.templates)
        image_first = rng.uniform() < self.options.reverse_ratio
        image = self.image(fields, rng, as_input=image_first)
        caption = self._caption(fields, rng)
        text = template.format(caption)
        parts: list[SegmentPart] = [image, text] if image_first else [text, image]
        segments = [Segment(parts)]
        if self.options.mask_left_label and image_first:
            segments = [Segment([image], learned=False), Segment([text])]
        elif self.options.mask_left_label:
            start, codes = self.split_image(image)
            segments = [Segment([text, start], learned=False), Segment([codes])]
        return SegmentList(segments, {"text": caption}, blank_problem(caption))

    def _caption(self, fields: RecordFields, rng: SeededRandom) -> str:
        if self.options.use_caption_in_metadata:
            return self.require(metadata_of(fields), self.options.caption_key_in_metadata, str)
        if not isinstance(fields.get("text"), list):
            return self.require(fields, "text", str)
        texts = self.choices(fields, "text")
        # No random number without the option.
        if self.options.first_text and rng.uniform() < self.options.first_text:
            return texts[0]
        return rng.choice(texts)


class Interleaved(Decoder):
    """A document.

    Fields: `image_ids` and `texts`, of the same length; at each index one of the two is None.
    """

    name = "pretrain.interleaved"
    learns_all = True
    can_split = True

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        # Share of documents in which every image is swapped with the element after it.
        reverse_ratio: float = setting(0.5, minimum=-1, maximum=1)
        # A document ends before the next image, or after the text that follows the last.
        max_images: int | None = positive(None)

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        images = self.require(fields, "image_ids", list)
        texts = self.require(fields, "texts", list)
        swaps = rng.uniform() < self.options.reverse_ratio
        if not is_interleaved(images, texts):
            return SegmentList(
                [], drop_reason="an element of the document is not either an image or a text"
            )

        # Up to the last image that is allowed, and the text that follows it.
        parts: list[SegmentPart] = []
        n_left = self.options.max_images  # images
        if n_left is None:
            n_left = len(images)
        for index in _swapped(images) if swaps else range(len(texts)):
            if images[index] is not None and n_left:
                parts.append(self.codes(images[index], f"image_ids[{index}]"))
                n_left -= 1
                continue
            if images[index] is None:
                parts.append(texts[index])
            if not n_left:
                break
        return SegmentList([Segment(parts)])


def is_interleaved(images: object, texts: object) -> bool:
    """Whether these are lists of equal length, with either an image or a text at each index."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        return False
    return all(
        (image is None) != (text is None) and isinstance(text, str | None)
        for image, text in zip(images, texts, strict=True)
    )


def _swapped(images: Sequence[object]) -> list[int]:
    """Indices of the elements, each image swapped with the element after it."""
    order: list[int] = []
    while len(order) < len(images):
        index = len(order)
        if images[index] is not None and index + 1 < len(images):
            order += [index + 1, index]
        else:
            order.append(index)
    return order


class Video(Decoder):
    """The first `num_frames` of a clip (`image_ids`) and its description (`answer`)."""

    name = "pretrain.video"

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        num_frames: int = positive(4)
        flat: bool = True  # one list with the codes of all frames; else a list for each frame

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        # Codes of a flat list, else lists of codes.
        n_frames = self.options.num_frames
        n_values = n_frames  # in `image_ids`
        if self.options.flat:
            n_values *= self.vocabulary.tokens_per_image
        values = self.require(fields, "image_ids", list)
        if self.options.flat and len(values) < n_values:
            raise BadRecord(
                "number of frames", f"image_ids: has fewer than num_frames ({n_frames}) frames."
            )
        frames = self.images({"image_ids": values[:n_values]})
        answer = self.require(fields, "answer", str)
        segments = [Segment(frames, learned=False), Segment([answer])]
        return SegmentList(segments, {"text": self.as_text(segments)})


class Text(Decoder):
    """Plain text (`text`)."""

    name = "pretrain.text"
    learns_all = True
    can_split = True

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        text = self.require(fields, "text", str)
        return SegmentList([Segment([text])], {"text": text}, blank_problem(text))


class Edit(Decoder):
    """An image, an instruction and the edited image.

    Fields: `source_image_ids`, `instruction`, `target_image_ids`.
    """

    name = "pretrain.edit"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        source = self.codes(fields.get("source_image_ids"), "source_image_ids")
        target = self.codes(fields.get("target_image_ids"), "target_image_ids")
        instruction = self.require(fields, "instruction", str).replace(EDIT_PREFIX, "")
        start, codes = self.split_image(target)
        # As in the original, where blanks of the instruction next to an image are stripped, the
        # image start of the target has no loss.
        has_blanks = self.tokenizer.strips_at_images and instruction != instruction.strip()
        prompt: list[SegmentPart] = [source, instruction]
        answer: list[SegmentPart] = [start, codes]
        if has_blanks:
            prompt, answer = [*prompt, start], [codes]
        return SegmentList([Segment(prompt, learned=False), Segment(answer)])
