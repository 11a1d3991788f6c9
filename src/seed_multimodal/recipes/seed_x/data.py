"""SEED-X's instruction tuning: conversations about an image, image generation, edits; and any
conversation (ours).

    seed_x.conversation   <s>[INST] [image]question [/INST]\\nanswer\\n[INST] question …</s>
    seed_x.caption        <s>[INST] request caption [/INST]\\n response[target]</s>
    seed_x.edit           <s>[INST] [source]instruction [/INST]\\nresponse[target]</s>
    seed_x.chat           <s>[INST] … [/INST]\\nanswer[target]\\n[INST] [repeated target]… </s>

Each turn is encoded separately. Learned are answers, the `<img>` of target images and the final
`</s>`; seed_x.caption learns the caption of an input image, and no token of a target image. Images:

    input     <patch> 64 tokens </patch> for each tile, <img> 64 tokens </img> for the whole image
    target    <img> 64 tokens </img>; the hidden states of the 64 tokens have a regression loss

Source: SEED-X's original code (`sft_clm.py`, `image_text_pairs_clm.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import (
    OptionValues,
    SeededRandom,
    Segment,
    SegmentList,
    SegmentPart,
    TrainingSequence,
    Turn,
    metadata_of,
    put_system_first,
)
from seed_multimodal.data.decoders.features import (
    FeatureDecoder,
    FeatureDecoderOptions,
    OpenedImage,
    OpenImage,
)
from seed_multimodal.data.formats.conversations import (
    NO_IMAGE,
    ROLE_ORDER,
    Placeholder,
    split_images,
)
from seed_multimodal.data.formats.pairs import shape_problem, similarity_problem
from seed_multimodal.data.formats.record import JsonObject, RecordFields
from seed_multimodal.images.views import ORIGINAL_GRIDS, choose_grid, read_grids
from seed_multimodal.language.prompts import PromptTemplate
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX, Ids, SeedXVocabulary
from seed_multimodal.models.seed_x.processing import seed_x_vocabulary, with_repeated_images
from seed_multimodal.settings import fraction, non_negative, positive, setting

INSTRUCTION = "{instruction}"


def find_placeholder(text: str) -> str:
    """The first placeholder in a text, or ""; `<img>` is a token, as in the original."""
    for part in split_images(text):
        if isinstance(part, Placeholder) and part.text != "<img>":
            return part.text
    return ""


@dataclass(frozen=True)
class SeedXOptions(FeatureDecoderOptions):
    """The original options."""

    # Tokens of an input view and of a target image; 0: the tokenizer's number.
    num_img_in_tokens: int = non_negative(0)
    num_img_out_tokens: int = non_negative(0)
    multi_resolution: bool = True  # tile images on one of `resolution_grids`
    resolution_grids: tuple[str, ...] = ORIGINAL_GRIDS
    base_resolution: int = positive(448)
    instruction_prompt: str = "[INST] {instruction} [/INST]\n"
    system_message: str = ""
    turn_sep: str = "\n"


@dataclass(frozen=True)
class FilterOptions(SeedXOptions):
    """With the original's limits of image shapes; 0: none."""

    min_resolution: int = non_negative(0)
    min_aspect_ratio: float = fraction(0.0)


class SeedXDecoder(FeatureDecoder):
    """Base of SEED-X's decoders."""

    Options = SeedXOptions
    options: SeedXOptions

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        super().__init__(tokenizer, options)
        self.vocabulary: SeedXVocabulary = seed_x_vocabulary(tokenizer)
        self.grids = read_grids(self.options.resolution_grids)

    def opened_image(
        self, fields: RecordFields, name: str, *, is_target: bool = False
    ) -> OpenedImage:
        """The opened image of a field, on the best grid."""
        image = self.require(fields, name, Image.Image)
        grid = None
        if self.options.multi_resolution:
            grid = choose_grid(image.size, self.grids, self.options.base_resolution)
        return OpenedImage(image, grid, is_target)

    @cached_property
    def template(self) -> PromptTemplate:
        prefix, _, suffix = self.options.instruction_prompt.partition(INSTRUCTION)
        return PromptTemplate("", prefix, suffix, self.options.turn_sep)

    def question_parts(
        self, text: str, image: OpenedImage | None, image_first: bool
    ) -> list[SegmentPart]:
        """A user's text with an image at its placeholder, else before or after it."""
        if image is None:
            return [text]
        placeholder = find_placeholder(text)
        if placeholder:
            left, _, right = text.partition(placeholder)
            return [left, image, right]
        return [image, text] if image_first else [text, image]

    def turns(
        self, turns: Sequence[Turn], unlearned: Collection[int] = (), system: str = ""
    ) -> SegmentList:
        """The turns after the system message, by default that of the options."""
        result = self.dialogue(self.template, turns, unlearned=unlearned)
        put_system_first(result, system or self.options.system_message, "\n")
        result.extra = {"text": self.as_text(result.segments)}
        return result

    def labels(self, part: SegmentPart, ids: list[int], learned: bool) -> list[int]:
        """As the base; of images, only the start of a target has a token loss."""
        if not isinstance(part, OpenedImage):
            return super().labels(part, ids, learned)
        learned_id = self.vocabulary.boi_id if part.is_target else None
        return [id if id == learned_id else IGNORE_INDEX for id in ids]

    def image_ids(self, image: OpenedImage) -> list[int]:
        """Tokens of an input or target image."""
        if image.is_target:
            return self.vocabulary.run(self.options.num_img_out_tokens)
        return list(self.vocabulary.read_ids(image.views, self.options.num_img_in_tokens))


class Conversation(SeedXDecoder):
    """A conversation, with an optional `image`.

    Fields: `data`, alternating questions and answers; `image`, which is put at `<image>`, else
    before or after the first question at random.
    """

    name = "seed_x.conversation"
    image_fields = ("image",)

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        turns = self.texts(fields, "data")
        has_image = fields.get("image") not in NO_IMAGE
        image = self.opened_image(fields, "image") if has_image else None
        image_first = rng.uniform() < 0.5

        # The turn of the image: the first question with a placeholder, else the first one.
        questions = range(0, len(turns), 2)
        image_turn = next((index for index in questions if find_placeholder(turns[index])), 0)
        messages: list[Turn] = []
        for index, text in enumerate(turns):
            turn_image = image if index == image_turn else None
            content = self.question_parts(text, turn_image, image_first)
            messages.append((ROLE_ORDER[index % 2], content))
        return self.turns(messages)


class FilteredDecoder(SeedXDecoder):
    """Base of decoders that drop images of some shapes."""

    Options = FilterOptions
    options: FilterOptions

    def shape_problem(self, image: OpenedImage) -> str:
        """Why the original filter drops an image of this size, or ""."""
        limits = self.options
        return shape_problem(image.image.size, limits.min_resolution, limits.min_aspect_ratio)


class Edit(FilteredDecoder):
    """An image and an instruction, answered with a sentence and the edited image.

    Fields: `source_image` (placed as in `Conversation`), `target_image`, `instruction`;
    `instruction_new` and `response` replace both texts.
    """

    name = "seed_x.edit"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(FilterOptions):
        # Share of samples without the instruction.
        prompt_drop_ratio: float = fraction(0.0)
        use_polite_response: bool = True  # answer with a sentence before the image

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        source = self.opened_image(fields, "source_image")
        target = self.opened_image(fields, "target_image", is_target=True)
        drop_reason = self.shape_problem(source)
        if drop_reason:
            return SegmentList([], drop_reason=drop_reason)

        # The order of the random choices is the original's.
        if fields.get("instruction_new") is not None and fields.get("response") is not None:
            instruction = self.require_text(fields, "instruction_new")
            response = self.require(fields, "response", str)
        else:
            response = rng.choice(phrases.SEEDX_EDIT_RESPONSES)
            if not self.options.use_polite_response:
                response = ""
            instruction = self.require_text(fields, "instruction")
        if rng.uniform() < self.options.prompt_drop_ratio:
            instruction = ""
        image_first = rng.uniform() < 0.5
        question = self.question_parts(instruction, source, image_first)
        return self.turns([("user", question), ("assistant", [response, target])])

    def _limit(self, sequence: TrainingSequence, max_length: int | None) -> None:
        if max_length is not None and len(sequence) >= max_length:
            sequence.drop_reason = f"not fewer than {max_length} tokens"  # as in the original


class Caption(FilteredDecoder):
    """An image (`image`) and its caption (`text`): text-to-image or, at random, captioning."""

    name = "seed_x.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FilterOptions):
        # Share of captioning samples; 0 and below: none.
        img_first_ratio: float = setting(0.5, minimum=-1, maximum=1)
        add_gen_prompt: bool = False  # prepend one of 28 requests to the caption
        similarity_thr: float | None = None  # see `pairs.similarity_problem`
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""  # in the record or in `metadata`

    options: Options

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        # 1. The original's filters.
        image = self.opened_image(fields, "image")
        drop_reason = self.shape_problem(image)
        metadata: RecordFields = {}
        if not drop_reason:
            metadata = {**metadata_of(fields), **fields}
            drop_reason = similarity_problem(metadata, self.options.similarity_thr)
        if drop_reason:
            return SegmentList([], drop_reason=drop_reason)

        # 2. The caption, in a request for the image if configured.
        if self.options.use_caption_in_metadata:
            caption = self.require_text(metadata, self.options.caption_key_in_metadata)
        else:
            caption = self.require_text(fields, "text")
        if self.options.add_gen_prompt:
            index = rng.randint(0, len(phrases.SEEDX_DRAW_REQUESTS) - 1)
            request = f"{phrases.SEEDX_DRAW_REQUESTS[index]} {caption.lstrip()}"
            prompt = self.options.instruction_prompt.replace(INSTRUCTION, request)
            caption = f"{prompt} {phrases.SEEDX_DRAW_RESPONSES[index]}"

        # 3. Captioning, or generation.
        if rng.uniform() < self.options.img_first_ratio:
            segment = Segment([image, caption])
        else:
            segment = Segment([caption, replace(image, is_target=True)], learned=False)
        return SegmentList([segment], {"text": caption})

    def _nothing_learned(self, segmented: SegmentList) -> str:
        return ""  # of tokens; a target image's features still have a loss


class Chat(SeedXDecoder):
    """Any conversation with images on both sides.

    Fields: `messages` from `formats.conversations.with_messages`. Images of answers are targets,
    which `with_repeated_images` also makes inputs.
    """

    name = "seed_x.chat"

    def open_images(self, fields: RecordFields, open_image_field: OpenImage) -> JsonObject:
        """The fields, with the images of the messages opened."""

        def open_part(part: JsonObject, name: str) -> JsonObject:
            return {"image": open_image_field(self.require(part, "image", object), name)}

        turns = self.messages(fields, open_part)
        messages = [
            {**message, "content": content}
            for message, (_, content) in zip(fields["messages"], turns, strict=True)
        ]
        return {**fields, "messages": messages}

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        turns: list[Turn] = []
        opened = self.messages(fields, lambda part, name: self.opened_image(part, "image"))
        unlearned = self.unlearned(fields)
        output_tokens = Ids(self.vocabulary.run(self.options.num_img_out_tokens))
        for index, (role, parts) in enumerate(with_repeated_images(opened)):
            content: list[SegmentPart] = []
            for part in parts:
                # Images of answers are targets; of answers that are context, only tokens.
                if role == "assistant" and isinstance(part, OpenedImage):
                    target = replace(part, is_target=True)
                    part = output_tokens if index in unlearned else target
                content.append(part)
            turns.append((role, content))
        return self.turns(turns, unlearned, fields.get("system") or "")
