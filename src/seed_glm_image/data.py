"""Records → training sequences of GLM-Image's language model; answers alone are learned.

    glm_image.draw    text (one caption or several), image_ids
    glm_image.edit    instruction, source_image_ids, target_image_ids

The codes of an image are a grid (rows of codes), or one row as `extract_image_ids…` writes it:
those of a square preview, then those of a square image. Those of a drawing have both, as a row or
as `image_ids` (a grid) and `preview_ids`. How the originals made previews is not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from seed_glm_image.processing import (
    GlmImageTokenizer,
    answer_grids,
    build_prompt,
    read_grids,
)
from seed_multimodal.data.decoders.base import Decoder, SeededRandom, TrainingSequence
from seed_multimodal.data.formats.record import BadRecord, RecordFields
from seed_multimodal.errors import CodesError, RequestError
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
        try:
            prompt = build_prompt(self.tokenizer, text, (height, width), sources)
        except RequestError as error:  # such as a text that is not Unicode
            raise BadRecord("refused", str(error)) from error
        vocabulary = self.tokenizer.vocabulary
        answer = [code for grid in grids for code in grid.flatten().tolist()]
        answer.append(vocabulary.eoi_id)
        ids = [*prompt.ids, vocabulary.boi_id, *answer]
        labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
        assert prompt.position_ids is not None
        if max_length is not None and len(ids) > max_length:
            reason = f"an image with its request has {len(ids)} tokens, rows have {max_length}"
            return TrainingSequence([], [], drop_reason=reason)
        return TrainingSequence(ids, labels, position_ids=prompt.position_ids.numpy())

    def grids(self, fields: RecordFields, name: str) -> list[Tensor]:
        """The codes of an image, of a row with those of its preview before them."""
        if fields.get(name) is None:
            self.require(fields, name, list)  # its message
        try:
            return read_grids(fields[name], self.vocabulary.n_codes, name)
        except CodesError as error:
            raise BadRecord("wrong codes", str(error)) from error

    def one_text(self, fields: RecordFields, name: str, rng: SeededRandom) -> str:
        """A text, or one of several."""
        if isinstance(fields.get(name), list):
            fields = {name: rng.choice(self.choices(fields, name))}
        return self.require_text(fields, name)


class Draw(GlmImageDecoder):
    """A caption and its image."""

    name: ClassVar[str] = "glm_image.draw"

    def request(self, fields: RecordFields, rng: SeededRandom) -> Request:
        # 1. A row has both grids.
        text = self.one_text(fields, "text", rng)
        grids = self.grids(fields, "image_ids")
        if len(grids) == 2:
            if fields.get("preview_ids") is not None:
                raise BadRecord("wrong codes", "preview_ids: image_ids has a preview, too.")
            return text, [], grids

        # 2. A grid needs its preview.
        preview = self.grids(fields, "preview_ids")[-1]
        (image,) = grids
        try:
            expected = answer_grids((image.shape[0], image.shape[1]), has_preview=True)[0]
        except RequestError as error:
            raise BadRecord("wrong codes", f"image_ids: {error}") from error
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
        text = self.one_text(fields, "instruction", rng)
        source = self.grids(fields, "source_image_ids")[-1]
        target = self.grids(fields, "target_image_ids")[-1]
        return text, [source], [target]
