"""SEED-X's instruction tuning: conversations about an image, image generation, edits; and any conversation (ours).

    seed_x.conversation   <s>[INST] [image]question [/INST]\\nanswer\\n[INST] question [/INST]\\nanswer</s>
    seed_x.caption        <s>[INST] request caption [/INST]\\n response[drawn]</s>     only [drawn] has a loss
    seed_x.edit           <s>[INST] [source]instruction [/INST]\\nresponse[drawn]</s>
    seed_x.chat           <s>[INST] … [/INST]\\nanswer[drawn]\\n[INST] [shown again]… [/INST]\\nanswer[drawn]</s>

Each turn is encoded on its own; answers, the `<img>` of generated images and the final `</s>` are learned. Images:

    read       <patch> 64 tokens </patch> for each tile, <img> 64 tokens </img> for the whole image
    written    <img> 64 tokens </img>; <img> has a token loss, the others' hidden states a regression loss

Source: SEED-X's original code (`sft_clm.py`, `image_text_pairs_clm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from PIL import Image

from seed_multimodal.data.decoders import base, phrases
from seed_multimodal.data.decoders.base import SeededRandom, Segment, SegmentList, metadata_of
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX, PLACEHOLDER
from seed_multimodal.seed_x.processing import seed_x_vocabulary
from seed_multimodal.seed_x.views import (
    ORIGINAL_GRIDS,
    Grid,
    choose_grid,
    patch_positions,
    read_grids,
)
from seed_multimodal.settings import setting

INSTRUCTION = "{instruction}"


# ---- images opened with their record; shared with LaVIT's decoders


@dataclass(frozen=True)
class OpenedImage:
    """An opened image, its tile grid (None: whole image only), and the `seed` of random choices at encoding."""

    image: Any
    grid: Grid | None
    is_target: bool = False
    seed: int = 0

    @property
    def views(self) -> int:
        """Number of tiles plus one."""
        return len(self.positions)

    @property
    def positions(self) -> list[list[float]]:
        """The centre (x, y) of each view."""
        found: list[list[float]] = patch_positions(self.grid or (1, 1)).tolist()
        return found if self.grid else found[-1:]


@dataclass
class ImageSequence(base.TrainingSequence):
    """A sequence with its images, and the indices of their tokens in `ids`."""

    images: list[OpenedImage] = field(default_factory=list)
    input_positions: list[int] = field(default_factory=list)
    target_positions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FeatureDecoderOptions(base.DecoderOptions):
    base_resolution: int = setting(224, minimum=1)  # side of a view in pixels


class FeatureDecoder(base.Decoder):
    """Base of these decoders; `interpolation` is used for the whole image."""

    Options: ClassVar[type[base.DecoderOptions]] = FeatureDecoderOptions
    interpolation: ClassVar[str] = "bilinear"
    image_fields: ClassVar[tuple[str, ...]] = ("image", "source_image", "target_image")

    def open_images(
        self, fields: Mapping[str, Any], open_image_field: Callable[[Any, str], Any]
    ) -> dict[str, Any]:
        """The fields, with images opened by `open_image_field(value, name)`."""
        return {
            **fields,
            **{
                name: open_image_field(fields[name], name)
                for name in self.image_fields
                if fields.get(name, "") not in NO_IMAGE
            },
        }

    def decode(
        self, fields: Mapping[str, Any], rng: SeededRandom, max_length: int | None = None
    ) -> ImageSequence:
        """As `Decoder.decode`, but images are never truncated."""
        segmented = self._segment(fields, rng)
        sequence = ImageSequence(
            [], [], segmented.extra, segmented.drop_reason or self._nothing_learned(segmented)
        )
        if not sequence.drop_reason:
            self._fill(sequence, segmented)
            self._limit(sequence, max_length)
        if not sequence.drop_reason and set(sequence.labels) == {IGNORE_INDEX}:
            sequence.drop_reason = f"there is nothing to learn within {max_length} tokens"
        return sequence

    def _fill(self, sequence: ImageSequence, segmented: SegmentList) -> None:
        """Add ids and labels of the segments to the sequence."""
        raise NotImplementedError

    def add(
        self,
        sequence: ImageSequence,
        ids: Sequence[int],
        labels: Sequence[int],
        image: OpenedImage | None = None,
    ) -> None:
        """Add a text, or the tokens of an image."""
        if image is not None:
            places = sequence.target_positions if image.is_target else sequence.input_positions
            places += [
                len(sequence) + place
                for place, id in enumerate(ids)
                if self.vocabulary.is_code_id(id)
            ]
            sequence.images.append(image)
        sequence.ids += ids
        sequence.labels += labels

    def _limit(self, sequence: ImageSequence, max_length: int | None) -> None:
        """Truncate an over-long sequence; drop it if that cuts an image or ends in one."""
        if max_length is None or len(sequence) <= max_length:
            return
        last = (
            max([*sequence.input_positions, *sequence.target_positions], default=-2) + 1
        )  # image end
        if last >= max_length or self.vocabulary.eoi_id in sequence.ids[-2:]:
            sequence.drop_reason = f"its images do not fit into {max_length} tokens"
            return
        sequence.n_truncated = len(sequence) - max_length
        sequence.ids, sequence.labels = sequence.ids[:max_length], sequence.labels[:max_length]


# ---- SEED-X


@dataclass(frozen=True)
class SeedXOptions(FeatureDecoderOptions):
    """The original options. `num_img_in_tokens`, `num_img_out_tokens`: tokens of an input view and of a target image;
    0: the tokenizer's number. `multi_resolution`: tile images on one of `resolution_grids`."""

    num_img_in_tokens: int = setting(0, minimum=0)
    num_img_out_tokens: int = setting(0, minimum=0)
    multi_resolution: bool = True
    resolution_grids: tuple[str, ...] = ORIGINAL_GRIDS
    base_resolution: int = setting(448, minimum=1)
    instruction_prompt: str = "[INST] {instruction} [/INST]\n"
    system_message: str = ""
    turn_sep: str = "\n"


@dataclass(frozen=True)
class FilterOptions(SeedXOptions):
    min_resolution: int = setting(0, minimum=0)
    min_aspect_ratio: float = setting(0.0, minimum=0, maximum=1)


class SeedXDecoder(FeatureDecoder):
    """Base of SEED-X's decoders."""

    Options = SeedXOptions

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, options)
        self.words = seed_x_vocabulary(tokenizer)
        self.grids = read_grids(self.options.resolution_grids)

    def use(self, fields: Mapping[str, Any], name: str, written: bool = False) -> OpenedImage:
        """The opened image of a field, on the best grid."""
        image, side = self.need(fields, name, Image.Image), self.options.base_resolution
        grid = choose_grid(image.size, self.grids, side) if self.options.multi_resolution else None
        return OpenedImage(image, grid, written)

    def misshapen(self, used: OpenedImage) -> str:
        """Why the original filter drops an image of this size, or empty."""
        return shape_problem(
            used.image.size, self.options.min_resolution, self.options.min_aspect_ratio
        )

    def asked(self, text: str, used: OpenedImage | None, before: bool) -> list[Any]:
        """The content of a user's turn: its text, with the image at `<image>`, else before or after it."""
        if used is None:
            return [text]
        left, placeholder, right = text.partition(PLACEHOLDER)
        parts = [left, used, right] if placeholder else [used, text] if before else [text, used]
        return [part for part in parts if part != ""]

    def instruct(self, content: Sequence[Any], first: bool = True) -> Segment:
        """A user's turn, without loss."""
        before, _, after = self.options.instruction_prompt.partition(INSTRUCTION)
        return Segment(
            [("" if first else self.options.turn_sep) + before, *content, after], learned=False
        )

    def talk(self, segments: Sequence[Segment]) -> SegmentList:
        """The segments after the system message."""
        message = self.options.system_message
        system = (
            [Segment([message if message.endswith("\n") else f"{message}\n"], learned=False)]
            if message
            else []
        )
        every = [*system, *segments]
        return SegmentList(every, {"text": self.as_text(every)})

    def _fill(self, sequence: ImageSequence, segmented: SegmentList) -> None:
        self.add(sequence, [self.tokenizer.bos_id], [IGNORE_INDEX])
        for segment in segmented.segments:
            for part, ids in self.pieces(segment.parts):
                if isinstance(part, str):
                    self.add(sequence, ids, ids if segment.learned else [IGNORE_INDEX] * len(ids))
                else:
                    learned = self.words.boi_id if part.is_target else None
                    self.add(
                        sequence, ids, [id if id == learned else IGNORE_INDEX for id in ids], part
                    )
        self.add(sequence, [self.tokenizer.eos_id], [self.tokenizer.eos_id])

    def image_ids(self, image: OpenedImage) -> list[int]:
        """Tokens of an input or target image."""
        if image.is_target:
            return self.words.run(self.options.num_img_out_tokens)
        return list(self.words.read_ids(image.views, self.options.num_img_in_tokens))


class Conversation(SeedXDecoder):
    """A conversation (`data`, alternating questions and answers), with an optional `image` at `<image>`, else before or
    after the first question at random."""

    name = "seed_x.conversation"
    image_fields = ("image",)

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        turns = self.texts(fields, "data")
        used = None if fields.get("image") in NO_IMAGE else self.use(fields, "image")
        before = rng.uniform() < 0.5
        shows = next((place for place in range(0, len(turns), 2) if PLACEHOLDER in turns[place]), 0)
        asked = [
            self.asked(text, used if place == shows else None, before)
            for place, text in enumerate(turns)
        ]
        return self.talk(
            [
                Segment([text]) if place % 2 else self.instruct(asked[place], place == 0)
                for place, text in enumerate(turns)
            ]
        )


class Edit(SeedXDecoder):
    """An image (placed as in `Conversation`) and an instruction, answered with a sentence and the edited image:
    `source_image`, `target_image`, `instruction`; `instruction_new` and `response` replace both texts.

    `prompt_drop_ratio`: share of samples without the instruction. `use_polite_response`: answer with a sentence first.
    """

    name = "seed_x.edit"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(FilterOptions):
        prompt_drop_ratio: float = setting(0.0, minimum=0, maximum=1)
        use_polite_response: bool = True

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        source, target = (
            self.use(fields, "source_image"),
            self.use(fields, "target_image", written=True),
        )
        reason = self.misshapen(source)
        if reason:
            return SegmentList([], drop_reason=reason)
        if fields.get("instruction_new") is not None and fields.get("response") is not None:
            instruction, response = (
                self.filled(fields, "instruction_new"),
                self.need(fields, "response", str),
            )
        else:
            response = rng.choice(phrases.SEEDX_EDIT_RESPONSES)
            response = response if self.options.use_polite_response else ""
            instruction = self.filled(fields, "instruction")
        instruction = "" if rng.uniform() < self.options.prompt_drop_ratio else instruction
        before = rng.uniform() < 0.5
        return self.talk(
            [self.instruct(self.asked(instruction, source, before)), Segment([response, target])]
        )

    def _limit(self, sequence: ImageSequence, max_length: int | None) -> None:
        if max_length is not None and len(sequence) >= max_length:
            sequence.drop_reason = f"not fewer than {max_length} tokens"  # as in the original


class Caption(SeedXDecoder):
    """An image (`image`) and its caption (`text`): text-to-image or, at random, captioning.

    `img_first_ratio`: share of captioning samples; below 0 none. `add_gen_prompt`: prepend one of 28 requests.
    `similarity_thr`: drop pairs below it (see `pairs.similarity_problem`). `caption_key_in_metadata`: with
    `use_caption_in_metadata`, the caption's key in the record or in `metadata`.
    """

    name = "seed_x.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FilterOptions):
        img_first_ratio: float = setting(0.5, minimum=-1, maximum=1)
        add_gen_prompt: bool = False
        similarity_thr: float | None = None
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        used = self.use(fields, "image")
        reason = self.misshapen(used) or similarity_problem(
            {**metadata_of(fields), **fields}, self.options.similarity_thr
        )
        if reason:
            return SegmentList([], drop_reason=reason)
        if self.options.use_caption_in_metadata:
            name, fields = self.options.caption_key_in_metadata, {**metadata_of(fields), **fields}
        else:
            name = "text"
        caption = self.filled(fields, name)
        if self.options.add_gen_prompt:
            number = rng.randint(0, len(phrases.SEEDX_DRAW_REQUESTS) - 1)
            request = f"{phrases.SEEDX_DRAW_REQUESTS[number]} {caption.lstrip()}"
            asked = self.options.instruction_prompt.replace(INSTRUCTION, request)
            caption = f"{asked} {phrases.SEEDX_DRAW_RESPONSES[number]}"
        image_first = rng.uniform() < self.options.img_first_ratio
        segment = (
            Segment([used, caption])
            if image_first
            else Segment([caption, replace(used, is_target=True)], False)
        )
        return SegmentList([segment], {"text": caption})

    def _nothing_learned(self, segmented: SegmentList) -> str:
        return ""  # a generated image has a loss in a segment that has none


class Chat(SeedXDecoder):
    """Any conversation with images on both sides: `messages` from `formats.conversations.with_messages`.

    Images of answers are targets. If the next message has no image, the last target is repeated as its input, so that
    successive edits look like single ones.
    """

    name = "seed_x.chat"

    def open_images(self, fields: Mapping[str, Any], open_image_field: Any) -> dict[str, Any]:
        """The fields, with the images of the messages opened."""
        return {
            **fields,
            "messages": [
                {
                    **message,
                    "content": [
                        part
                        if isinstance(part, str)
                        else {
                            "image": open_image_field(
                                self.need(part, "image", object),
                                f"messages[{place}].content[{number}]",
                            )
                        }
                        for number, part in enumerate(message["content"])
                    ],
                }
                for place, message in enumerate(self.need(fields, "messages", list))
            ],
        }

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        segments: list[Segment] = []
        drawn: dict[str, Any] | None = None
        for place, message in enumerate(self.need(fields, "messages", list)):
            written, content = bool(place % 2), message["content"]
            images = [part for part in content if not isinstance(part, str)]
            if not written and drawn and not images:
                content = [drawn, *content]
            parts = [
                part if isinstance(part, str) else self.use(part, "image", written)
                for part in content
            ]
            segments.append(Segment(parts) if written else self.instruct(parts, place == 0))
            drawn = images[-1] if written and images else None
        return self.talk(segments)
