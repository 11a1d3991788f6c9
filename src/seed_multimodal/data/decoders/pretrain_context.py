"""Decoders of pretraining data with further captioned pictures as context: retrieved neighbours, examples in a prompt.

    pretrain.retrieval      <s>pair pair pair</s>, the pairs all one way round         everything learned but <s>
    pretrain.caption_eval   <s>[picture]caption[picture]caption[picture]prompt         nothing (a prompt)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders.base import LIST, OBJECT, PICTURE, TEXT, Decoder, DecoderOptions, Draft, Part, Span
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.settings import setting


class Retrieval(Decoder):
    """A picture-caption pair and the similar pairs retrieved for it.

    Fields: `image_ids`, `text`, `context` (a list of records with `image_ids` and `text`).

    Options:
        reverse_ratio: share of samples with the pictures first.
        max_images: pairs taken (None: all); with random_num_images, a number drawn from min_images to max_images.
        mask_left_label: the left half of each pair is not learned.
    """

    name = "pretrain.retrieval"
    needs = {"image_ids": PICTURE, "text": TEXT, "context": LIST}

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        reverse_ratio: float = setting(0.5, least=-1, most=1)
        mask_left_label: bool = False
        random_num_images: bool = False
        min_images: int = setting(1, least=1)
        max_images: int | None = setting(None, least=1)

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        context = self.list_of(fields, "context")
        if not all(isinstance(one, Mapping) for one in context):
            raise BadRecord("wrong type", "context: must be a list of records with image_ids and text.")
        number = self.options.max_images
        if self.options.random_num_images:
            least = self.options.min_images
            number = draws.randint(least, max(least, number or 1 + len(context)))
        if number is None or number > 1:
            draws.shuffle(context)
        chosen = [{key: fields.get(key) for key in ("text", "image_ids")}, *context][:number]
        image_first = draws.uniform() < self.options.reverse_ratio
        spans: list[Span] = []
        for pair in chosen:
            halves: list[Part] = [self.picture(pair, draws, read=image_first), self.text(pair, "text")]
            left, right = halves if image_first else halves[::-1]
            spans += [Span([left], learned=not self.options.mask_left_label), Span([right])]
        return Draft(spans, {"text": json.dumps(chosen), "filter_flag": True})


class CaptionEval(Decoder):
    """The prompt of the released captioning evaluation: nothing is learned, no `</s>`.

    Fields: `image_ids`, `context` (captioned pictures to imitate), `metadata.image_id`.
    Options: num_context (how many of them), caption_prompt (what the caption is to begin with).
    """

    name = "pretrain.caption_eval"
    needs = {"image_ids": PICTURE, "context": LIST, "metadata": OBJECT}
    reads_pictures = False

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        num_context: int = setting(2, least=0)
        caption_prompt: str = ""

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        shots = self.list_of(fields, "context")[:self.options.num_context] if self.options.num_context else []
        parts: list[Part] = []
        for shot in shots:
            if not isinstance(shot, Mapping):
                raise BadRecord("wrong type", "context: must be a list of records with image_ids and text.")
            parts += [self.picture(shot, draws, read=False), self.text(shot, "text")]
        parts += [self.picture(fields, draws, read=False), self.options.caption_prompt]
        metadata = fields.get("metadata")
        if not isinstance(metadata, Mapping) or "image_id" not in metadata:
            raise BadRecord("missing key", "metadata: holds no image_id.")
        name = metadata["image_id"]
        if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
            raise BadRecord("wrong type", "metadata: image_id must be a number or a text.")
        return Draft([Span(parts, learned=False)], {"image_id": name, "filter_flag": True}, end=False)
