"""Captions of images, scored as COCO's evaluation does (`caption_scores`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Line, Run
from seed_multimodal.evaluation.caption_scores import caption_scores
from seed_multimodal.system.base import MultimodalSystem


class Captions:
    """The task "caption" with a system."""

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[Sample]) -> None:
        self.system = system
        self.run = run

    def answer(self, samples: Sequence[Sample], images: Sequence[Any]) -> list[Line]:
        """Caption a batch."""
        captions = self.system.describe(images, batch_size=self.run.batch, **self.run.options)
        return [{"caption": self.run.cut(text)} for text in captions]

    def score(
        self, samples: Sequence[Sample], lines: Mapping[Any, Line]
    ) -> tuple[Any, dict[str, Any]]:
        """Results in COCO's format, and scores."""
        captions = {sample.key: lines[sample.key].get("caption", "") for sample in samples}
        results = [{"image_id": key, "caption": caption} for key, caption in captions.items()]
        if not captions:
            return results, {}
        references = {sample.key: sample.references for sample in samples}
        scores, notes = caption_scores(captions, references)
        summary: dict[str, Any] = {name: round(value, 4) for name, value in scores.items()}
        if notes:
            summary["notes"] = notes
        return results, summary
