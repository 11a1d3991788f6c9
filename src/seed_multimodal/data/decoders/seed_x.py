"""SEED-X's instruction tuning: conversations about an image, captions to draw from, edits; and any conversation (ours).

    seed_x.conversation   <s>[INST] [image]question [/INST]\\nanswer\\n[INST] question [/INST]\\nanswer</s>
    seed_x.caption        <s>[INST] request caption [/INST]\\n response[drawn]</s>     of it only [drawn] is learned
    seed_x.edit           <s>[INST] [source]instruction [/INST]\\nresponse[drawn]</s>
    seed_x.chat           <s>[INST] … [/INST]\\nanswer[drawn]\\n[INST] [shown again]… [/INST]\\nanswer[drawn]</s>

Each turn is encoded on its own; answers, the `<img>` of drawn images and the final `</s>` are learned. Images:

    read       <patch> 64 words </patch> for each part of the image, <img> 64 words </img> for the whole
    written    <img> 64 words </img>; of these only <img> is learned as a word, the others' states are

Source: SEED-X's original code (`sft_clm.py`, `image_text_pairs_clm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from PIL import Image

from seed_multimodal.data.decoders import base, phrases
from seed_multimodal.data.decoders.base import IGNORED, Draft, SeededDraws, Segment, metadata_of
from seed_multimodal.data.filters import bad_shape, dissimilar
from seed_multimodal.data.formats.conversations import NO_IMAGE
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.seed_x.processing import seed_x_words
from seed_multimodal.seed_x.views import RELEASED_GRIDS, Grid, choose_grid, patch_positions, read_grids
from seed_multimodal.settings import setting

INSTRUCTION = "{instruction}"


# ---- images that are opened with their record: for LaVIT's decoders, too


@dataclass(frozen=True)
class UsedPicture:
    """An opened image, its grid of parts (None: the whole alone), and the `seed` of random choices at its encoding."""

    picture: Any
    grid: Grid | None
    written: bool = False
    seed: int = 0

    @property
    def views(self) -> int:
        """The parts and the whole."""
        return len(self.positions)

    @property
    def positions(self) -> list[list[float]]:
        """The centre (x, y) of each view."""
        found: list[list[float]] = patch_positions(self.grid or (1, 1)).tolist()
        return found if self.grid else found[-1:]


@dataclass
class PictureSequence(base.TokenSequence):
    """A sequence with its images, and the indices of their words in `ids`."""

    pictures: list[UsedPicture] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class OpenedOptions(base.DecoderOptions):
    base_resolution: int = setting(224, least=1)  # side of a view in pixels


class OpenedDecoder(base.Decoder):
    """Base of these decoders; `interpolation` is that of an image seen as a whole."""

    Options: ClassVar[type[base.DecoderOptions]] = OpenedOptions
    interpolation: ClassVar[str] = "bilinear"
    image_fields: ClassVar[tuple[str, ...]] = ("image", "source_image", "target_image")

    def opened(self, fields: Mapping[str, Any], open_picture: Callable[[Any, str], Any]) -> dict[str, Any]:
        """The fields with their images opened by `open_picture(value, name)`."""
        return {**fields, **{name: open_picture(fields[name], name) for name in self.image_fields
                             if fields.get(name, "") not in NO_IMAGE}}

    def decode(self, fields: Mapping[str, Any], draws: SeededDraws, max_length: int | None = None) -> PictureSequence:
        """As of `Decoder`, but images are never cut."""
        draft = self._draft(fields, draws)
        sequence = PictureSequence([], [], draft.extra, draft.dropped or self._nothing_learned(draft))
        if not sequence.dropped:
            self._fill(sequence, draft)
            self._limit(sequence, max_length)
        if not sequence.dropped and set(sequence.labels) == {IGNORED}:
            sequence.dropped = f"there is nothing to learn within {max_length} tokens"
        return sequence

    def _fill(self, sequence: PictureSequence, draft: Draft) -> None:
        """Put the ids and labels of the segments into the sequence."""
        raise NotImplementedError

    def add(self, sequence: PictureSequence, ids: Sequence[int], labels: Sequence[int], image: UsedPicture | None = None
            ) -> None:
        """Add a text, or the words of an image."""
        if image is not None:
            places = sequence.written if image.written else sequence.read
            places += [len(sequence) + place for place, id in enumerate(ids) if self.vocabulary.is_code_id(id)]
            sequence.pictures.append(image)
        sequence.ids += ids
        sequence.labels += labels

    def _limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        """Cut an over-long sequence on the right; it is dropped where that would cut an image, or ends in one."""
        if max_length is None or len(sequence) <= max_length:
            return
        last = max([*sequence.read, *sequence.written], default=-2) + 1  # its closing bracket
        if last >= max_length or self.vocabulary.eoi_id in sequence.ids[-2:]:
            sequence.dropped = f"its images do not fit into {max_length} tokens"
            return
        sequence.cut = len(sequence) - max_length
        sequence.ids, sequence.labels = sequence.ids[:max_length], sequence.labels[:max_length]


# ---- SEED-X


@dataclass(frozen=True)
class PictureOptions(OpenedOptions):
    """The original options. `num_img_in_tokens`, `num_img_out_tokens`: words of a view that is read, of an image that
    is written; 0: the tokenizer's number. `multi_resolution`: images are cut on one of `resolution_grids`."""

    num_img_in_tokens: int = setting(0, least=0)
    num_img_out_tokens: int = setting(0, least=0)
    multi_resolution: bool = True
    resolution_grids: tuple[str, ...] = RELEASED_GRIDS
    base_resolution: int = setting(448, least=1)
    instruction_prompt: str = "[INST] {instruction} [/INST]\n"
    system_message: str = ""
    turn_sep: str = "\n"


@dataclass(frozen=True)
class FilterOptions(PictureOptions):
    min_resolution: int = setting(0, least=0)
    min_aspect_ratio: float = setting(0.0, least=0, most=1)


class PictureDecoder(OpenedDecoder):
    """Base of SEED-X's decoders."""

    Options = PictureOptions

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, options)
        self.words = seed_x_words(tokenizer)
        self.grids = read_grids(self.options.resolution_grids)

    def use(self, fields: Mapping[str, Any], name: str, written: bool = False) -> UsedPicture:
        """The opened image of a field on the grid that suits it."""
        image, side = self.need(fields, name, Image.Image), self.options.base_resolution
        grid = choose_grid(image.size, self.grids, side) if self.options.multi_resolution else None
        return UsedPicture(image, grid, written)

    def misshapen(self, used: UsedPicture) -> str:
        """Why the original filter leaves out an image of this size; empty if it does not."""
        return bad_shape(used.picture.size, self.options.min_resolution, self.options.min_aspect_ratio)

    def asked(self, text: str, used: UsedPicture | None, before: bool) -> list[Any]:
        """The content of a user's turn: its text, and an image in the place of its `<image>`, else before or after."""
        if used is None:
            return [text]
        left, placeholder, right = text.partition(PLACEHOLDER)
        parts = [left, used, right] if placeholder else [used, text] if before else [text, used]
        return [part for part in parts if part != ""]

    def instruct(self, content: Sequence[Any], first: bool = True) -> Segment:
        """A user's turn, not learned."""
        before, _, after = self.options.instruction_prompt.partition(INSTRUCTION)
        return Segment([("" if first else self.options.turn_sep) + before, *content, after], learned=False)

    def talk(self, segments: Sequence[Segment]) -> Draft:
        """The segments after the system message."""
        message = self.options.system_message
        system = [Segment([message if message.endswith("\n") else f"{message}\n"], learned=False)] if message else []
        every = [*system, *segments]
        return Draft(every, {"text": self.as_text(every)})

    def _fill(self, sequence: PictureSequence, draft: Draft) -> None:
        self.add(sequence, [self.tokenizer.bos_id], [IGNORED])
        for segment in draft.segments:
            for part, ids in self.pieces(segment.parts):
                if isinstance(part, str):
                    self.add(sequence, ids, ids if segment.learned else [IGNORED] * len(ids))
                else:
                    learned = self.words.boi_id if part.written else None
                    self.add(sequence, ids, [id if id == learned else IGNORED for id in ids], part)
        self.add(sequence, [self.tokenizer.eos_id], [self.tokenizer.eos_id])

    def image_ids(self, image: UsedPicture) -> list[int]:
        """The words of an image that is read or written."""
        if image.written:
            return self.words.run(self.options.num_img_out_tokens)
        return list(self.words.read_ids(image.views, self.options.num_img_in_tokens))


class Conversation(PictureDecoder):
    """A conversation (`data`, question and answer in turn), with an `image` at its `<image>`, else before or after the
    first question at random, or without one."""

    name = "seed_x.conversation"
    image_fields = ("image",)

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        turns = self.texts(fields, "data")
        used = None if fields.get("image") in NO_IMAGE else self.use(fields, "image")
        before = draws.uniform() < 0.5
        shows = next((place for place in range(0, len(turns), 2) if PLACEHOLDER in turns[place]), 0)
        asked = [self.asked(text, used if place == shows else None, before) for place, text in enumerate(turns)]
        return self.talk([Segment([text]) if place % 2 else self.instruct(asked[place], place == 0)
                          for place, text in enumerate(turns)])


class Edit(PictureDecoder):
    """An image (placed as a conversation's) and what to change, answered with a sentence and the changed image:
    `source_image`, `target_image`, `instruction`; `instruction_new` and `response` replace both texts.

    `prompt_drop_ratio`: share of samples without the instruction. `use_polite_response`: answer with a sentence first.
    """

    name = "seed_x.edit"
    image_fields = ("source_image", "target_image")

    @dataclass(frozen=True)
    class Options(FilterOptions):
        prompt_drop_ratio: float = setting(0.0, least=0, most=1)
        use_polite_response: bool = True

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        source, target = self.use(fields, "source_image"), self.use(fields, "target_image", written=True)
        reason = self.misshapen(source)
        if reason:
            return Draft([], dropped=reason)
        if fields.get("instruction_new") is not None and fields.get("response") is not None:
            instruction, response = self.filled(fields, "instruction_new"), self.need(fields, "response", str)
        else:
            response = draws.choice(phrases.SEEDX_EDIT_RESPONSES)
            response = response if self.options.use_polite_response else ""
            instruction = self.filled(fields, "instruction")
        instruction = "" if draws.uniform() < self.options.prompt_drop_ratio else instruction
        before = draws.uniform() < 0.5
        return self.talk([self.instruct(self.asked(instruction, source, before)), Segment([response, target])])

    def _limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        if max_length is not None and len(sequence) >= max_length:
            sequence.dropped = f"not fewer than {max_length} tokens"  # as in the original


class Caption(PictureDecoder):
    """An image (`image`) and its caption (`text`): the image is drawn from it or, at random, read and described.

    `img_first_ratio`: share of samples that describe; below 0 none. `add_gen_prompt`: ask for the image with one of 28
    requests. `similarity_thr`: leave out pairs below it (see `data.filters`). `caption_key_in_metadata`: with
    `use_caption_in_metadata`, the caption's key in the record or in `metadata`.
    """

    name = "seed_x.caption"
    image_fields = ("image",)

    @dataclass(frozen=True)
    class Options(FilterOptions):
        img_first_ratio: float = setting(0.5, least=-1, most=1)
        add_gen_prompt: bool = False
        similarity_thr: float | None = None
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        used = self.use(fields, "image")
        reason = self.misshapen(used) or dissimilar(
            {**metadata_of(fields), **fields}, self.options.similarity_thr)
        if reason:
            return Draft([], dropped=reason)
        if self.options.use_caption_in_metadata:
            name, fields = self.options.caption_key_in_metadata, {**metadata_of(fields), **fields}
        else:
            name = "text"
        caption = self.filled(fields, name)
        if self.options.add_gen_prompt:
            number = draws.randint(0, len(phrases.SEEDX_DRAW_REQUESTS) - 1)
            request = f"{phrases.SEEDX_DRAW_REQUESTS[number]} {caption.lstrip()}"
            asked = self.options.instruction_prompt.replace(INSTRUCTION, request)
            caption = f"{asked} {phrases.SEEDX_DRAW_RESPONSES[number]}"
        image_first = draws.uniform() < self.options.img_first_ratio
        segment = Segment([used, caption]) if image_first else Segment([caption, replace(used, written=True)], False)
        return Draft([segment], {"text": caption})

    def _nothing_learned(self, draft: Draft) -> str:
        return ""  # a drawn image is learned in a segment that is not


class Chat(PictureDecoder):
    """Any conversation with images on both sides: `messages` as `formats.conversations.with_messages` makes them.

    An image of an answer is drawn. Where the next message has none, the drawn one is shown again in front of it, so
    that several edits follow each other as single ones do.
    """

    name = "seed_x.chat"

    def opened(self, fields: Mapping[str, Any], open_picture: Any) -> dict[str, Any]:
        """The fields with the images of the messages opened."""
        return {**fields, "messages": [{**message, "content": [
            part if isinstance(part, str) else {"image": open_picture(
                self.need(part, "image", object), f"messages[{place}].content[{number}]")}
            for number, part in enumerate(message["content"])]}
            for place, message in enumerate(self.need(fields, "messages", list))]}

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        segments: list[Segment] = []
        drawn: dict[str, Any] | None = None
        for place, message in enumerate(self.need(fields, "messages", list)):
            written, content = bool(place % 2), message["content"]
            images = [part for part in content if not isinstance(part, str)]
            if not written and drawn and not images:
                content = [drawn, *content]
            parts = [part if isinstance(part, str) else self.use(part, "image", written) for part in content]
            segments.append(Segment(parts) if written else self.instruct(parts, place == 0))
            drawn = images[-1] if written and images else None
        return self.talk(segments)
