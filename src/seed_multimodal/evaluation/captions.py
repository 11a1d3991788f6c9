"""Captions of images, scored as COCO's evaluation does (`caption_scores`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.annotations import Sample, read_captions
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line, Scores
from seed_multimodal.evaluation.caption_scores import caption_scores
from seed_multimodal.settings import setting


@dataclass(kw_only=True)
class CaptionFile(Benchmark[Sample]):
    """A benchmark that reads captions."""

    file: Path = setting(
        flag="--captions",
        metavar="FILE",
        help="COCO's captions, Karpathy's file dataset_coco.json, or a list with image and "
        "caption; to draw also a list of texts, or a .txt",
    )
    split: str = setting("test", help="of Karpathy's file (default: test)")


@dataclass(kw_only=True)
class Captions(CaptionFile):
    """Captions of images."""

    title = "captions of images: CIDEr and others"
    kind = options_of = "caption"

    truth: Path | None = setting(
        None, metavar="JSON", help="captions to compare with (NoCaps, Flickr30k)"
    )

    def samples(self) -> list[Sample]:
        return read_captions(self.file, self.split, self.truth)

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        captions = self.system.describe(images, **self.text_options())
        return [{"caption": self.cut(text)} for text in captions]

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """Results in COCO's format, and scores; an image without caption gets an empty one."""
        captions = [line.get("caption", "") for line in lines]
        results: list[JsonObject] = []
        for sample, caption in zip(samples, captions, strict=True):
            results.append({"image_id": sample.key, "caption": caption})
        scores, notes = caption_scores(captions, [sample.references for sample in samples])
        return Scores(results, {name: round(value, 4) for name, value in scores.items()}, notes)
