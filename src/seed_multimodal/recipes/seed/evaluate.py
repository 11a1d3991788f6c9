"""Evaluation of SEED-LLaMA as in the original scripts."""

from __future__ import annotations

from dataclasses import replace

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import GenerationError
from seed_multimodal.evaluation.text2image import Drawings
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.pipelines.base import MultimodalSystem


def unconditional_codes(system: MultimodalSystem, options: JsonObject) -> list[int]:
    """The codes generated after `<s><img>`, the original script's negative condition.

    options: of generation; those of drawing are left out.
    """
    generation = dict(options)
    for name in system.images.drawing_settings:
        generation.pop(name, None)
    settings = replace(system.settings(**generation), images="forced")
    ids = system.engine.generate([Prompt(system.tokenizer.start_ids)], settings)[0]
    for part in AnswerReader(system.tokenizer).read_all(ids).parts:
        if isinstance(part, ImagePart):
            return list(part.codes)
    raise GenerationError("The model generates no complete image without a caption.")


class SeedDrawings(Drawings):
    """Drawings of captions."""

    def use(self, system: MultimodalSystem) -> None:
        super().use(system)
        # The original script's guidance is against the image without caption.
        if self.original:
            assert isinstance(system.config, SeedLlamaConfig)
            negative = unconditional_codes(system, self.options)
            self.options = {**self.options, "negative_codes": negative}
