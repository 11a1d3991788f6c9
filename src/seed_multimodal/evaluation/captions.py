"""Captions of images, with COCO's scores by pycocoevalcap: BLEU, ROUGE-L, CIDEr, METEOR, SPICE.

The Penn Treebank tokenizer, METEOR and SPICE are Java programs. Without Java words are split at
blanks and punctuation, and both scores are missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.evaluation.annotations import Sample, read_captions
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line, Scores
from seed_multimodal.settings import setting

NO_JAVA = (
    "Scores were computed without Java: words were split at blanks and punctuation instead of by "
    "the Penn Treebank tokenizer, so they differ slightly from published ones; METEOR and SPICE "
    "are missing."
)
NO_CIDER = "CIDEr is missing: it weighs words by the other images, and there is one image."
PARSER = "stanford-corenlp-3.6.0.jar"
NO_PARSER = (
    "SPICE is missing: `python -c 'from pycocoevalcap.spice.spice import Spice; Spice()'` "
    "downloads what it needs, Stanford CoreNLP 3.6.0 (500 MB)."
)


@dataclass(kw_only=True)
class CaptionFile(Benchmark[Sample]):
    """A benchmark that reads captions."""

    file: str | Path = setting(
        flag="--captions",
        metavar="FILE",
        help="COCO's captions, Karpathy's file dataset_coco.json, or a list with image and "
        "caption; to draw also a list of texts, or a .txt",
    )
    split: str = setting("test", may_change=True, help="of Karpathy's file (default: test)")


@dataclass(kw_only=True)
class Captions(CaptionFile):
    """Captions of images."""

    title = "captions of images: CIDEr and others"
    kind = options_of = "caption"

    truth: str | Path | None = setting(
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
        results = [
            {"image_id": sample.key, "caption": caption}
            for sample, caption in zip(samples, captions, strict=True)
        ]
        scores, notes = caption_scores(captions, [sample.references for sample in samples])
        return Scores(results, {name: round(value, 4) for name, value in scores.items()}, notes)


# ---- scores


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[str]]:
    """Corpus scores of a caption of each image, by its references, and notes on missing scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice import spice

    # 1. The texts as the scorers read them.
    java = shutil.which("java") is not None
    expected = _tokenized(references, java)
    answers = _tokenized([[caption] for caption in captions], java)

    # 2. The scorers that can run; Spice() would download its parser.
    scorers = {"ROUGE_L": Rouge}
    notes: list[str] = []
    if len(captions) > 1:
        scorers["CIDEr"] = Cider
    else:
        notes.append(NO_CIDER)
    parser = Path(spice.__file__).with_name("lib") / PARSER
    if java:
        scorers["METEOR"] = Meteor
    if java and parser.is_file():
        scorers["SPICE"] = spice.Spice
    else:
        notes.append(NO_PARSER if java else NO_JAVA)

    # 3. The scores, without what the scorers print.
    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(sys.stderr):
        bleu = Bleu(4).compute_score(expected, answers, verbose=0)[0]
        for order, value in enumerate(bleu, 1):
            scores[f"Bleu_{order}"] = float(value)
        for name, scorer in scorers.items():
            scores[name] = float(scorer().compute_score(expected, answers)[0])
    return scores, notes


def _tokenized(texts: Sequence[Sequence[str]], java: bool) -> dict[int, list[str]]:
    """The texts of each image with blanks between their tokens."""
    # Words by a pattern.
    if not java:
        return {
            index: [" ".join(re.findall(r"[\w'-]+", text.lower())) for text in of_image]
            for index, of_image in enumerate(texts)
        }

    # Stanford's program reads a line for each text.
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {
        index: [{"caption": " ".join(text.split())} for text in of_image]
        for index, of_image in enumerate(texts)
    }
    return PTBTokenizer().tokenize(lines)
