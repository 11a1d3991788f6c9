"""COCO's caption scores by pycocoevalcap: BLEU-1…4, ROUGE-L, CIDEr; METEOR and SPICE.

The Penn Treebank tokenizer, METEOR and SPICE are Java programs. Without Java words are split at blanks and punctuation,
and both scores are missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key", int, str, int | str)
NO_JAVA = (
    "Scores were computed without Java: words were split at blanks and punctuation instead of by the Penn "
    "Treebank tokenizer, so they differ slightly from published ones; METEOR and SPICE are missing."
)
PARSER = "stanford-corenlp-3.6.0.jar"
NO_PARSER = (
    "SPICE is missing: `python -c 'from pycocoevalcap.spice.spice import Spice; Spice()'` downloads what it "
    "needs, Stanford CoreNLP 3.6.0 (500 MB)."
)


def caption_scores(
    captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]], java: bool | None = None
) -> tuple[dict[str, float], list[str]]:
    """Corpus scores of one caption per image against its references, and notes on missing scores.

    Args:
        java: whether to run the Java programs; None: if Java is installed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.spice import spice

    java = shutil.which("java") is not None if java is None else java
    expected = _tokenized({key: references[key] for key in captions}, java)
    answers = _tokenized({key: [caption] for key, caption in captions.items()}, java)
    scorers: dict[str, Any] = {"ROUGE_L": Rouge, "CIDEr": Cider}
    if java:
        scorers["METEOR"] = Meteor
        if (
            Path(spice.__file__).with_name("lib").joinpath(PARSER).is_file()
        ):  # else Spice() would download it
            scorers["SPICE"] = spice.Spice
    with contextlib.redirect_stdout(sys.stderr):  # the scorers print
        bleu = Bleu(4).compute_score(expected, answers, verbose=0)[0]
        scores = {f"Bleu_{order}": float(value) for order, value in enumerate(bleu, 1)}
        scores |= {
            name: float(scorer().compute_score(expected, answers)[0])
            for name, scorer in scorers.items()
        }
    return scores, [] if "SPICE" in scorers else [NO_PARSER if java else NO_JAVA]


def _tokenized(texts: Mapping[Key, Sequence[str]], java: bool) -> dict[Key, list[str]]:
    if not java:
        return {
            key: [" ".join(re.findall(r"[\w'-]+", text.lower())) for text in several]
            for key, several in texts.items()
        }
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {
        key: [{"caption": " ".join(text.split())} for text in several]
        for key, several in texts.items()
    }
    tokens: dict[Key, list[str]] = PTBTokenizer().tokenize(lines)
    return tokens
