"""SEED-LLaMA's pre-training data: captions, interleaved documents, clips, text, edits.

pretrain.caption        <s>[image]caption</s>  or  <s>caption[image]</s>       everything learned
pretrain.interleaved    <s>texts and images in the order of the document</s>   everything learned
pretrain.video          <s>[frame][frame][frame][frame]caption</s>             caption learned
pretrain.text           <s>text</s>                                            everything learned
pretrain.edit           <s>[source]instruction[target]</s>                     target learned
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders import base
from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    Part,
    SeededRandom,
    Segment,
    SegmentList,
)
from seed_multimodal.data.decoders.phrases import EDIT_PREFIX
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import setting

BLANK = "the text is blank"


class Caption(Decoder):
    """An image (`image_ids` or `views`) and its caption (`text`, which may be a list).

    `reverse_ratio`: share of samples with the image first. `caption_prompt`: one template with `{}` for the caption, or
    several. `mask_left_label`: no loss on the left part. `use_caption_in_metadata`: the caption is
    `metadata[caption_key_in_metadata]`. `first_text`: share of samples with the first of several captions (ours).
    """

    name, whole = "pretrain.caption", True

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, minimum=-1, maximum=1)
        mask_left_label: bool = False
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""
        first_text: float = setting(0.0, minimum=0, maximum=1)
        caption_prompt: str | list[str] | None = None

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """Raises ConfigError: as `Decoder`, or a template without a single `{}`."""
        super().__init__(tokenizer, options)
        templates = self.options.caption_prompt or "{}"
        self.templates = [templates] if isinstance(templates, str) else templates
        for template in self.templates:
            try:
                template.format("a caption")
            except (LookupError, ValueError):
                raise ConfigError(
                    f"decoder {self.name}: caption_prompt {template!r} must have one {{}} for the "
                    "caption, and no other braces."
                ) from None

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        prompt = rng.choice(self.templates)
        image_first = rng.uniform() < self.options.reverse_ratio
        image = self.image(fields, rng, read=image_first)
        caption = self._caption(fields, rng)
        parts: list[Part] = [image, prompt.format(caption)]
        blank = "" if caption.strip(base.BLANK_CAPTION) else BLANK
        return SegmentList(
            [Segment(parts if image_first else parts[::-1])], {"text": caption}, blank
        )

    def _caption(self, fields: Mapping[str, Any], rng: SeededRandom) -> str:
        if self.options.use_caption_in_metadata:
            return self.need(base.metadata_of(fields), self.options.caption_key_in_metadata, str)
        if not isinstance(fields.get("text"), list):
            return self.need(fields, "text", str)
        texts = self.choices(fields, "text")
        first = self.options.first_text and rng.uniform() < self.options.first_text
        return texts[0] if first else rng.choice(texts)

    def decode(
        self, fields: Mapping[str, Any], rng: SeededRandom, max_length: int | None = None
    ) -> base.TrainingSequence:
        """As `Decoder.decode`; drops a sample whose left part (without loss) was truncated."""
        sequence = super().decode(fields, rng, max_length)
        if self.options.mask_left_label:
            image_first = sequence.ids[1:2] == [self.vocabulary.boi_id]
            last = self.vocabulary.eoi_id if image_first else self.vocabulary.boi_id
            end = sequence.ids.index(last) + 1 if last in sequence.ids else 0
            sequence.labels[:end] = [IGNORE_INDEX] * end
            sequence.drop_reason = (
                sequence.drop_reason
                if end
                else f"the left part does not end within {max_length} tokens"
            )
        return sequence


class Interleaved(Decoder):
    """A document: `image_ids` and `texts` have the same length; at each index one of the two is None.

    `reverse_ratio`: share of documents in which every image is swapped with the element after it.
    `max_images`: a document ends before the next image, or after the text that follows the last.
    """

    name, whole = "pretrain.interleaved", True

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, minimum=-1, maximum=1)
        max_images: int | None = setting(None, minimum=1)

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        images, texts = self.need(fields, "image_ids", list), self.need(fields, "texts", list)
        backwards = rng.uniform() < self.options.reverse_ratio
        if len(images) != len(texts) or any(
            (a is None) == (b is None) for a, b in zip(images, texts, strict=True)
        ):
            return SegmentList(
                [], drop_reason="an element of the document is not either an image or a text"
            )
        parts: list[Part] = []
        left = len(images) if self.options.max_images is None else self.options.max_images
        for place in _swapped(images) if backwards else range(len(texts)):
            if images[place] is not None and left:
                parts.append(self.codes(images[place], f"image_ids[{place}]"))
                left -= 1
                continue
            if images[place] is None:
                parts.append(self.need({f"texts[{place}]": texts[place]}, f"texts[{place}]", str))
            if not left:
                break
        return SegmentList([Segment(parts)])


def _swapped(images: Sequence[Any]) -> list[int]:
    """Indices of the elements, each image swapped with the element after it."""
    order: list[int] = []
    while len(order) < len(images):
        place = len(order)
        pair = images[place] is not None and place + 1 < len(images)
        order += [place + 1, place] if pair else [place]
    return order


class Video(Decoder):
    """The first `num_frames` of a clip (`image_ids`; `flat`: one flat list, else one per frame) and its description
    (`answer`)."""

    name = "pretrain.video"

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        num_frames: int = setting(4, minimum=1)
        flat: bool = True

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        number, per_frame = (
            self.options.num_frames,
            self.vocabulary.tokens_per_image if self.options.flat else 1,
        )
        codes = self.need(fields, "image_ids", list)
        if self.options.flat and len(codes) < number * per_frame:
            raise BadRecord(
                "number of frames", f"image_ids: has fewer than num_frames ({number}) frames."
            )
        frames = self.images({"image_ids": codes[: number * per_frame]})
        segments = [Segment(frames, learned=False), Segment([self.need(fields, "answer", str)])]
        return SegmentList(segments, {"text": self.as_text(segments)})


class Text(Decoder):
    """Plain text (`text`)."""

    name, whole = "pretrain.text", True

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        text = self.need(fields, "text", str)
        return SegmentList(
            [Segment([text])], {"text": text}, "" if text.strip(base.BLANK_CAPTION) else BLANK
        )


class Edit(Decoder):
    """An image, an instruction and the edited image: `source_image_ids`, `instruction`, `target_image_ids`."""

    name, whole = "pretrain.edit", True

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        source, target = (
            self.codes(fields.get(name), name) for name in ("source_image_ids", "target_image_ids")
        )
        instruction = self.need(fields, "instruction", str).replace(EDIT_PREFIX, "")
        return SegmentList([Segment([source, instruction, target])])

    def _join(self, segmented: SegmentList) -> tuple[list[int], list[int]]:
        ids, labels = super()._join(segmented)
        # As in the original: counted on the instruction alone, so blanks stripped next to the image mask `<img>` too.
        count = (
            1
            + self.vocabulary.image_length
            + len(self.tokenizer.encode(segmented.segments[0].parts[1]))
        )
        return ids, [IGNORE_INDEX] * min(count, len(ids)) + labels[count:]
