"""METEOR and SPICE of captions: Java programs that pycocoevalcap holds. What is missing is told; it ends nothing."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError, first_line, how_to_install
from seed_multimodal.hub import DOWNLOADS_OFF
from seed_multimodal.language.caption_scores import Key, caption_words

PARSER = " with Stanford CoreNLP 3.6.0 (downloaded once, 500 MB, with HF_HUB_OFFLINE=0)"
METRICS = {"METEOR": ("pycocoevalcap.meteor.meteor", "Meteor"), "SPICE": ("pycocoevalcap.spice.spice", "Spice")}


def java_scores(captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> tuple[dict[str, float],
                                                                                              list[str]]:
    """Corpus scores of one caption a picture, and a sentence for each that there is none of."""
    scores, notes = dict[str, float](), []
    if shutil.which("java") is None:
        return {}, [f"{' and '.join(METRICS)} are not computed: they need Java and pycocoevalcap "
                    f"({how_to_install('pycocoevalcap')}); the other scores do not."]
    made = {key: [" ".join(caption_words(text))] for key, text in captions.items()}
    wanted = {key: [" ".join(caption_words(one)) for one in references[key]] for key in captions}
    for name, (module, kind) in METRICS.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # they print
                scores[name] = float(_scorer(module, kind).compute_score(wanted, made)[0])
        except Exception as error:  # noqa: BLE001 (another program's: package, archive, download, memory)
            notes.append(f"{name} is not computed ({first_line(error)}): it needs Java and pycocoevalcap "
                         f"({how_to_install('pycocoevalcap')}){PARSER if name == 'SPICE' else ''}; the other scores do "
                         "not.")
    return scores, notes


def _scorer(module: str, kind: str) -> Any:
    import importlib

    import pycocoevalcap  # its sentence, if it is missing
    from huggingface_hub import constants

    parser = Path(pycocoevalcap.__path__[0], "spice", "lib", "stanford-corenlp-3.6.0.jar")
    if kind == "Spice" and constants.HF_HUB_OFFLINE and not parser.is_file():  # it would be downloaded unasked
        raise CheckpointError(f"{parser} is not there, and {DOWNLOADS_OFF}")
    return getattr(importlib.import_module(module), kind)()
