"""Captions of images, scored as COCO's evaluation does (`caption_scores`)."""

from __future__ import annotations

from collections.abc import Sequence

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.annotations import Key, Sample
from seed_multimodal.evaluation.answers import Images, Line, Run, Scores
from seed_multimodal.evaluation.caption_scores import caption_scores
from seed_multimodal.pipelines.base import MultimodalSystem


class Captions:
    """The task "caption" with a system."""

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[Sample]) -> None:
        self.system = system
        self.run = run

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        """Caption a batch."""
        captions = self.system.describe(images, batch_size=self.run.batch, **self.run.options)
        return [{"caption": self.run.cut(text)} for text in captions]

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """Results in COCO's format, and scores; an image without caption gets an empty one."""
        # 1. Results.
        captions: dict[Key, str] = {}
        references: dict[Key, list[str]] = {}
        for sample, line in zip(samples, lines, strict=True):
            captions[sample.key] = line.get("caption", "")
            references[sample.key] = sample.references
        results: list[JsonObject] = [
            {"image_id": key, "caption": caption} for key, caption in captions.items()
        ]

        # 2. Scores, if there are any captions.
        if not captions:
            return Scores(results, {})
        scores, notes = caption_scores(captions, references)
        return Scores(results, {name: round(value, 4) for name, value in scores.items()}, notes)
