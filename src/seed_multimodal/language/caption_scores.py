"""Scores of captions by pycocoevalcap, as COCO's evaluation computes them: BLEU-1…4, ROUGE-L, CIDEr; METEOR and SPICE.

The Penn Treebank tokenizer, METEOR and SPICE are Java programs. Without Java words are split at blanks and punctuation,
the two scores are missing, and the notes say so. CIDEr's document frequencies are those of the references given, so its
value belongs to the set that was scored.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from seed_multimodal.errors import first_line

Key = TypeVar("Key", int, str, int | str)
NO_JAVA = ("Scores were computed without Java: words were split at blanks and punctuation instead of by the Penn "
           "Treebank tokenizer, so they differ slightly from published ones; METEOR and SPICE are missing.")
PARSER = "lib/stanford-corenlp-3.6.0.jar"  # of SPICE
NO_PARSER = ("SPICE is missing: run `python -c 'from pycocoevalcap.spice.spice import Spice; Spice()'` once, which "
             "downloads Stanford CoreNLP 3.6.0 (500 MB).")


def caption_scores(captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]], java: bool | None = None
                   ) -> tuple[dict[str, float], list[str]]:
    """Corpus scores of one caption per image against its references, and notes on what could not be computed.

    Args:
        java: whether to run the Java programs; None: if Java is installed.

    Raises:
        ImportError: pycocoevalcap (the extra eval) is missing.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = shutil.which("java") is not None if java is None else java
    wanted = _tokenized({key: references[key] for key in captions}, java)
    made = _tokenized({key: [caption] for key, caption in captions.items()}, java)
    with contextlib.redirect_stdout(sys.stderr):  # the scorers print
        values = Bleu(4).compute_score(wanted, made, verbose=0)[0]
        scores = {f"Bleu_{order}": float(value) for order, value in enumerate(values, 1)}
        scores |= {"ROUGE_L": float(Rouge().compute_score(wanted, made)[0]),
                   "CIDEr": float(Cider().compute_score(wanted, made)[0])}
        if not java:
            return scores, [NO_JAVA]
        more, notes = _java_scores(wanted, made)
    return scores | more, notes


def _java_scores(wanted: Mapping[Key, list[str]], made: Mapping[Key, list[str]]) -> tuple[dict[str, float], list[str]]:
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    scores, notes = dict[str, float](), list[str]()
    ready = Path(spice.__file__).with_name("lib").joinpath(Path(PARSER).name).is_file()  # else it would download it
    for name, kind in (("METEOR", Meteor), ("SPICE", spice.Spice if ready else None)):
        try:
            if kind is None:
                notes.append(NO_PARSER)
            else:
                scores[name] = float(kind().compute_score(wanted, made)[0])
        except Exception as error:  # noqa: BLE001 (another program's: memory, a read-only folder, a broken pipe)
            notes.append(f"{name} could not be computed ({first_line(error)}).")
    return scores, notes


def _tokenized(texts: Mapping[Key, Sequence[str]], java: bool) -> dict[Key, list[str]]:
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        found: dict[Key, list[str]] = PTBTokenizer().tokenize(  # one caption a line
            {key: [{"caption": " ".join(text.split())} for text in several] for key, several in texts.items()})
        return found
    return {key: [" ".join(re.findall(r"[\w'-]+", text.lower())) for text in several] for key, several in texts.items()}
