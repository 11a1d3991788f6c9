"""Captions of images, scored as COCO's evaluation does (`caption_scores`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Line, Run
from seed_multimodal.evaluation.caption_scores import caption_scores


class Captions:
    """The task "caption" with a system."""

    def __init__(self, system: Any, run: Run, samples: Sequence[Sample]) -> None:
        self.system, self.run = system, run

    def answer(self, samples: Sequence[Sample], images: Sequence[Any]) -> list[Line]:
        """Caption a batch."""
        captions = self.system.describe(images, batch_size=self.run.batch, **self.run.options)
        return [{"caption": self.run.cut(text)} for text in captions]

    def score(
        self, samples: Sequence[Sample], lines: Mapping[Any, Line]
    ) -> tuple[Any, dict[str, Any]]:
        """Results in COCO's format, and scores."""
        captions = {one.key: lines[one.key].get("caption", "") for one in samples}
        results = [{"image_id": key, "caption": caption} for key, caption in captions.items()]
        if not captions:
            return results, {}
        scores, notes = caption_scores(captions, {one.key: one.references for one in samples})
        numbers = {name: round(value, 4) for name, value in scores.items()}
        return results, {**numbers, "notes": notes} if notes else numbers
