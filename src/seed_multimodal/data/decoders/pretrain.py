"""Decoders of the pretraining data: captions, interleaved documents, clips, text, edits.

    pretrain.caption        <s>[picture]caption</s>  or  <s>caption[picture]</s>       everything learned
    pretrain.interleaved    <s>texts and pictures in the order of the document</s>     everything learned
    pretrain.video          <s>[frame][frame][frame][frame]caption</s>                 caption learned
    pretrain.text           <s>text</s>                                                everything learned
    pretrain.edit           <s>[source]instruction[target]</s>                         target learned
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import (
    LIST,
    PICTURE,
    PICTURES,
    TEXT,
    TEXTS,
    Decoder,
    DecoderOptions,
    Draft,
    Part,
    Span,
)
from seed_multimodal.data.decoders.sequence import IGNORED, Draws, TokenSequence
from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting

EMPTY = "the text is blank"


class Caption(Decoder):
    """One picture and its caption.

    Fields: `image_ids` (and, or, `views`: code lists of the same picture, see `Decoder.picture`), `text`; `metadata`
    with `use_caption_in_metadata`.

    Options:
        reverse_ratio: share of samples with the picture first.
        caption_prompt: a template with `{}` for the caption, or a list of which one is drawn.
        mask_left_label: the left part is not learned; a sample whose middle was cut off is dropped.
        use_caption_in_metadata, caption_key_in_metadata: where the caption stands.
        first_text: where `text` is a list of captions, the share of draws that take the first, else any (ours).
    """

    name = "pretrain.caption"
    needs = {"image_ids": PICTURE, "text": TEXTS}

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, least=-1, most=1)
        mask_left_label: bool = False
        use_caption_in_metadata: bool = False
        caption_key_in_metadata: str = ""
        first_text: float = setting(0.0, least=0, most=1)
        caption_prompt: str | list[str] | None = None

    def __init__(self, *arguments: Any) -> None:
        """See `Decoder`. Raises ConfigError also for a prompt that is no template."""
        super().__init__(*arguments)
        given = self.options.caption_prompt
        self.prompts = ["{}"] if given is None else [given] if isinstance(given, str) else list(given)
        if not self.prompts:
            raise ConfigError(f"decoder {self.name}: caption_prompt must be a text with {{}} for the caption, or a "
                              "list of such texts.")
        for prompt in self.prompts:
            try:
                prompt.format("")
            except (IndexError, KeyError, ValueError) as error:
                raise ConfigError(f"decoder {self.name}: caption_prompt {prompt!r} is no template with one {{}} "
                                  f"({error}).") from error

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        prompt = draws.choice(self.prompts)
        image_first = draws.uniform() < self.options.reverse_ratio
        picture = self.picture(fields, draws, read=image_first)
        caption = self._caption(fields, draws)
        parts = [picture, prompt.format(caption)]
        blank = not caption.strip(phrases.BLANK_CAPTION)
        return Draft([Span(parts if image_first else parts[::-1])], {"text": caption, "filter_flag": not blank},
                     dropped=EMPTY if blank else "", whole=True, image_first=image_first)

    def _caption(self, fields: Mapping[str, Any], draws: Draws) -> str:
        if self.options.use_caption_in_metadata:
            key, metadata = self.options.caption_key_in_metadata, fields.get("metadata")
            metadata = _parsed(metadata) if isinstance(metadata, str) else metadata
            if not isinstance(metadata, Mapping) or not isinstance(metadata.get(key), str):
                raise BadRecord("missing key", f"metadata: holds no caption under {key!r}.")
            return str(metadata[key])
        several = fields.get("text")
        if not isinstance(several, list) or not several or not all(isinstance(one, str) for one in several):
            return self.text(fields, "text")
        if self.options.first_text and draws.uniform() < self.options.first_text:
            return str(several[0])
        return str(draws.choice(several))

    def decode(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> TokenSequence:
        """See `Decoder`."""
        draft = self.draft(fields, draws)
        sequence = TokenSequence([], [], draft.extra, draft.dropped)
        self._fill(sequence, draft, max_length)
        if self.options.mask_left_label:
            last = self.vocabulary.eoi_id if draft.image_first else self.vocabulary.boi_id
            if last in sequence.ids:
                end = sequence.ids.index(last) + 1
                sequence.labels[:end] = [IGNORED] * end
            else:
                sequence.extra["filter_flag"] = False
                sequence.dropped = f"the left part does not end within {max_length} tokens"
        return sequence


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return None


class Interleaved(Decoder):
    """A document of pictures and texts.

    Fields: `image_ids` and `texts`, equally long; at each place one of the two is None. `metadata` (may be empty).

    Options:
        reverse_ratio: share of documents in which every picture is swapped with the element after it.
        max_images: a document ends before the next picture, or after the text that follows the last.
    """

    name = "pretrain.interleaved"
    needs = {"image_ids": PICTURES, "texts": LIST}
    reads_pictures = False

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, least=-1, most=1)
        max_images: int | None = setting(None, least=1)

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if "metadata" not in fields:
            raise BadRecord("missing key", "metadata: is missing; an interleaved document has it (it may be {}).")
        images, texts = self.list_of(fields, "image_ids"), self.list_of(fields, "texts")
        if len(images) != len(texts):
            raise BadRecord("images and placeholders",
                            f"image_ids: {len(images)} places, but texts has {len(texts)}; each place is one of both.")
        backwards = draws.uniform() < self.options.reverse_ratio
        wrong = next((n for n in range(len(texts)) if (images[n] is None) == (texts[n] is None)), None)
        if wrong is not None:
            return Draft(dropped=f"place {wrong} of the document is not either a picture or a text")
        parts: list[Part] = []
        left = self.options.max_images
        for place in _swapped(images) if backwards else range(len(texts)):
            if images[place] is None:
                if not isinstance(texts[place], str):
                    raise BadRecord("wrong type", f"texts[{place}]: must be a text, not {shorten(texts[place])}.")
                parts.append(texts[place])
                if left == 0:
                    break
            elif left == 0:
                break
            else:
                parts.append(self.codes(images[place], f"image_ids[{place}]"))
                left = None if left is None else left - 1
        return Draft([Span(parts)], {"filter_flag": True}, whole=True)


def _swapped(images: Sequence[Any]) -> list[int]:
    """Indices of the elements, each picture swapped with the element after it."""
    order: list[int] = []
    place = 0
    while place < len(images):
        pair = images[place] is not None and place + 1 < len(images)
        order += [place + 1, place] if pair else [place]
        place += 2 if pair else 1
    return order


class Video(Decoder):
    """The frames of a clip and what it shows.

    Fields: `image_ids` (frames one after the other), `answer`.

    Options:
        num_frames: how many frames are taken; there must be as many.
        flat: frames as one long list; false: a list per frame.
    """

    name = "pretrain.video"
    needs = {"image_ids": PICTURES, "answer": TEXT}

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        num_frames: int = setting(4, least=1)
        flat: bool = True

    @classmethod
    def guess_options(cls, fields: Mapping[str, Any], tokens_per_image: int) -> dict[str, Any]:
        """See `Decoder`: all the frames there are."""
        frames = fields["image_ids"]
        return {"flat": False} if isinstance(frames[0], list) else {"num_frames": len(frames) // tokens_per_image}

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if fields.get("answer") is None:
            return self.lacking(["answer"])
        number = self.options.num_frames
        frames = self.pictures(fields, draws, read=True, flat=self.options.flat, at_most=number)
        if self.options.flat and len(frames) < number:
            if self.validate:
                raise BadRecord("number of frames",
                                f"image_ids: holds {len(frames)} frames, but num_frames is {number}.")
            frames += [[] for _ in range(number - len(frames))]  # as released: <img></img>
        answer = self.text(fields, "answer")
        return Draft([Span(frames, learned=False), Span([answer])],
                     {"text": self.as_text([*frames, answer]), "filter_flag": True})


class Text(Decoder):
    """Text alone, cut where it is too long. Field: `text`."""

    name = "pretrain.text"
    needs = {"text": TEXT}
    reads_pictures = False

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if fields.get("text") is None:
            return self.lacking(["text"], {"filter_flag": False})
        value = self.text(fields, "text")
        blank = not value.strip(phrases.BLANK_CAPTION)
        return Draft([Span([value])], {"text": value, "filter_flag": not blank}, EMPTY if blank else "", whole=True)


class Edit(Decoder):
    """A picture, what to change, and the changed picture. Fields: `source_image_ids`, `target_image_ids`,
    `instruction`."""

    name = "pretrain.edit"
    needs = {"source_image_ids": PICTURE, "target_image_ids": PICTURE, "instruction": TEXT}

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        source = self.picture(fields, draws, read=True, name="source_image_ids")
        target = self.picture(fields, draws, read=False, name="target_image_ids")
        instruction = self.text(fields, "instruction").replace(phrases.EDIT_PREFIX, "")
        # As released: counted on the instruction alone, so blanks lost next to the picture hide `<img>` too.
        hidden = 1 + self.vocabulary.image_length + len(self.tokenizer.encode(instruction))
        return Draft([Span([source, instruction, target])], {"filter_flag": True}, whole=True, unlearned=hidden)
