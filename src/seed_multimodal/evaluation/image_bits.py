"""The language model's loss on held-out images, in bits of an image.

Losses of a token cannot be compared between tokenizers with other vocabularies and other numbers of
codes; the bits of all codes of an image and of its end can. They are those of a drawing of the
image's caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.benchmark import Images, Line, Scores
from seed_multimodal.evaluation.captions import Captions
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics


@dataclass(kw_only=True)
class ImageBits(Captions):
    """Bits of images with a caption."""

    title = "bits of an image: the language model's loss on its codes"
    kind = options_of = "bits"

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        """The negative log-likelihood of each image's codes and end, and the codes."""
        captions = [sample.caption for sample in samples]
        likelihoods = self.system.image_likelihoods(
            images, captions, verbatim=self.prompts == "plain", batch_size=self.batch_size
        )
        codes = self.system.tokenize(images)
        return [
            {"bits": -likelihood.total / math.log(2), "codes": row.tolist()}
            for likelihood, row in zip(likelihoods, codes, strict=True)
        ]

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """bits: of an image by the language model. code_bits: by the tokenizer, its number of codes
        times log2 of the codes in use. codes: of an image."""
        results = [
            {"image_id": sample.key, "bits": line["bits"], "codes": line["codes"]}
            for sample, line in zip(samples, lines, strict=True)
            if "bits" in line
        ]
        if not results:
            return Scores([], {})
        lengths = [len(result["codes"]) for result in results]
        table = np.full((len(results), max(lengths)), -1)
        for row, result in zip(table, results, strict=True):
            row[: len(result["codes"])] = result["codes"]
        statistics = codebook_statistics(table, int(table.max()) + 1)
        values = {
            "bits": bootstrap([result["bits"] for result in results]),
            "code_bits": statistics["image_bits"],
            "codes": float(np.mean(lengths)),
        }
        return Scores(results, values)
