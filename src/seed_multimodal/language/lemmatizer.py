"""LaVIT's answers by the base forms of their words, as its released programs count them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal

from seed_multimodal.errors import ConfigError, SeedWarning, first_line, how_to_install
from seed_multimodal.settings import check_value

SPACY_MODEL = "en_core_web_sm"


class Lemmatizer:
    """Answers in lower case, nouns and verbs by their base form, words separated by single blanks.

    Args:
        choice: "spacy" needs spaCy with its English model, "none" leaves the words' forms, "auto" takes spaCy if it is
            there and else says so once (`SeedWarning`); `uses_spacy` tells which it was.
        model: spaCy's name or folder of the model.

    Raises:
        ConfigError: spaCy is needed, and it or its model is not there.
    """

    def __init__(self, choice: Literal["auto", "spacy", "none"] = "auto", model: str = SPACY_MODEL) -> None:
        check_value(str, choice, "lemmatizer", choices=("auto", "spacy", "none"))
        self._read: Any = None
        if choice == "none":
            return
        try:
            self._read = importlib.import_module("spacy").load(model)  # of an extra that nothing else here needs
        except (ImportError, OSError) as error:  # the package, the model
            how = f"{how_to_install('spacy')}, then python -m spacy download {model}"
            if choice == "spacy":
                raise ConfigError(f"Answers cannot be lemmatised ({first_line(error)}): {how}; or choose none."
                                  ) from error
            warnings.warn(f"Answers are not lemmatised as the released model's are, because spaCy or its model {model} "
                          f"is not there ({how}); scores can be lower by a little.", SeedWarning, stacklevel=2)

    @property
    def uses_spacy(self) -> bool:
        """Whether answers are lemmatised."""
        return self._read is not None

    def __call__(self, answer: str) -> str:
        text = answer.lower()
        if self._read is None:
            return " ".join(text.split())
        return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in self._read(text))
