"""Records → training sequences of GLM-Image's language model; answers alone are learned.

    glm_image.draw    text (one caption or several), image_ids
    glm_image.edit    instruction, source_image_ids, target_image_ids

The codes of an image are a grid (rows of codes), or one row as `extract_image_ids…` writes it:
those of a square preview, then those of a square image. Those of a drawing have both, as a row or
as `image_ids` (a grid) and `preview_ids`. How the originals made previews is not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from seed_glm_image.processing import (
    PREVIEW,
    GlmImageTokenizer,
    answer_grids,
    build_prompt,
    code_grid,
)
from seed_multimodal.data.decoders.base import Decoder, SeededRandom, TrainingSequence
from seed_multimodal.data.formats.record import BadRecord, RecordFields
from seed_multimodal.errors import CodesError
from seed_multimodal.language.vocabulary import IGNORE_INDEX

# Text, source images and the answer's grids.
Request = tuple[str, Sequence[Tensor], Sequence[Tensor]]


class GlmImageDecoder(Decoder):
    """Base of both; they define `request`."""

    tokenizer: GlmImageTokenizer

    @staticmethod
    def load_tokenizer(folder: Any) -> GlmImageTokenizer:
        return GlmImageTokenizer.from_pretrained(folder)

    def request(self, fields: RecordFields, rng: SeededRandom) -> Request:
        """What a record asks for, and its answer."""
        raise NotImplementedError

    def decode(
        self, fields: RecordFields, rng: SeededRandom, max_length: int | None = None
    ) -> TrainingSequence:
        """The sequence of a record, with its positions; one that is too long is dropped.

        Raises BadRecord: a field is missing or wrong.
        """
        text, sources, grids = self.request(fields, rng)
        height, width = grids[-1].shape
        prompt = build_prompt(self.tokenizer, text, (height, width), sources)
        vocabulary = self.tokenizer.vocabulary
        answer = [code for grid in grids for code in grid.flatten().tolist()]
        answer.append(vocabulary.eoi_id)
        ids = [*prompt.ids, vocabulary.boi_id, *answer]
        labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
        assert prompt.position_ids is not None
        if max_length is not None and len(ids) > max_length:
            reason = f"an image with its request has {len(ids)} tokens, rows have {max_length}"
            return TrainingSequence([], [], drop_reason=reason)
        return TrainingSequence(
            ids, labels, position_ids=prompt.position_ids.numpy().astype(np.int64)
        )

    def grid(self, value: object, name: str) -> Tensor:
        """The codes of an image; of a row those behind its preview."""
        if isinstance(value, list) and value and type(value[0]) is int:
            return self.split_row(value, name)[1]
        return self.checked(value, name)

    def split_row(self, row: list[int], name: str) -> list[Tensor]:
        """The grids of a square preview and a square image, of their codes in one row."""
        side = math.isqrt(max(0, len(row) - PREVIEW**2))
        if not side or side**2 + PREVIEW**2 != len(row):
            raise BadRecord(
                "number of codes",
                f"{name}: {len(row)} codes in a row are no square preview and image: give a grid.",
            )
        codes = self.checked([row], name)[0]
        preview, image = codes.split([PREVIEW**2, side**2])
        return [preview.view(PREVIEW, PREVIEW), image.view(side, side)]

    def checked(self, value: object, name: str) -> Tensor:
        if value is None:
            self.require({}, name, list)  # its message
        try:
            return code_grid(value, self.vocabulary.n_codes, name)
        except CodesError as error:
            raise BadRecord("wrong codes", str(error)) from error


class Draw(GlmImageDecoder):
    """A caption and its image."""

    name: ClassVar[str] = "glm_image.draw"

    def request(self, fields: RecordFields, rng: SeededRandom) -> Request:
        text = fields.get("text")
        if isinstance(text, list):
            text = rng.choice(self.choices(fields, "text"))
        text = self.require_text({"text": text}, "text")
        value = fields.get("image_ids")
        if isinstance(value, list) and value and type(value[0]) is int:
            return text, [], self.split_row(value, "image_ids")
        image = self.checked(value, "image_ids")
        preview = self.checked(fields.get("preview_ids"), "preview_ids")
        expected = answer_grids((image.shape[0], image.shape[1]), has_preview=True)[0]
        if tuple(preview.shape) != expected:
            raise BadRecord(
                "number of codes",
                f"preview_ids: of an image of {tuple(image.shape)} codes it has {expected}, not "
                f"{tuple(preview.shape)}.",
            )
        return text, [], [preview, image]


class Edit(GlmImageDecoder):
    """A source image, an instruction, and the edited image."""

    name: ClassVar[str] = "glm_image.edit"

    def request(self, fields: RecordFields, rng: SeededRandom) -> Request:
        text = self.require_text(fields, "instruction")
        source = self.grid(fields.get("source_image_ids"), "source_image_ids")
        target = self.grid(fields.get("target_image_ids"), "target_image_ids")
        return text, [source], [target]
