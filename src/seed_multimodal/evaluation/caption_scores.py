"""COCO's caption scores by pycocoevalcap: BLEU-1…4, ROUGE-L, CIDEr; METEOR and SPICE.

The Penn Treebank tokenizer, METEOR and SPICE are Java programs. Without Java words are split at
blanks and punctuation, and both scores are missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NO_JAVA = (
    "Scores were computed without Java: words were split at blanks and punctuation instead of by "
    "the Penn Treebank tokenizer, so they differ slightly from published ones; METEOR and SPICE "
    "are missing."
)
PARSER = "stanford-corenlp-3.6.0.jar"
NO_PARSER = (
    "SPICE is missing: `python -c 'from pycocoevalcap.spice.spice import Spice; Spice()'` "
    "downloads what it needs, Stanford CoreNLP 3.6.0 (500 MB)."
)


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
    scorers: dict[str, Any] = {"ROUGE_L": Rouge, "CIDEr": Cider}
    notes: list[str] = []
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
    tokens: dict[int, list[str]] = {}
    if not java:
        for index, of_image in enumerate(texts):
            tokens[index] = [" ".join(re.findall(r"[\w'-]+", text.lower())) for text in of_image]
        return tokens

    # Stanford's program reads a line for each text.
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines: dict[int, list[dict[str, str]]] = {}
    for index, of_image in enumerate(texts):
        lines[index] = [{"caption": " ".join(text.split())} for text in of_image]
    tokens = PTBTokenizer().tokenize(lines)
    return tokens
