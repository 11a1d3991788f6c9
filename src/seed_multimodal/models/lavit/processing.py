"""LaVIT's vocabulary, prompts, and parsing of answers.

    0 … 31999   text pieces (0 <unk>, 1 <s>, 2 </s>, which also pads)
    32000/32001 start and end of an image
    32002 + k   visual code k; an image has 1 … 256 of them

Image tokens have ids only, no text. Prompts do not start with `<s>`.

    caption, answer   start, features, end, text     text is optional
    drawing           text and codes in order, start    continued with codes, end

Captions end at the first ".", answers at the first of `ANSWER_ENDS`. Source: arXiv 2309.04669 and
the behaviour of its original programs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from seed_multimodal.errors import CheckpointError, SeedWarning, install_hint
from seed_multimodal.inference.prompt import Prompt, PromptImage
from seed_multimodal.language.hub_tokenizer import IMAGE_TOKENS, HubTokenizer
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.tokenizer import MultimodalTokenizer, read_files
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.models.seed.captions import question_text
from seed_multimodal.settings import check_value

QUESTION = "Question: {} Answer:"
CAPTION_ENDS = (".",)  # so "Dr. Smith" is cut to "Dr", as in the original
ANSWER_ENDS = ("\n", "question:", "Long answer:", ",", ".")
SPACY_MODEL = "en_core_web_sm"


@dataclass(frozen=True)
class LavitVocabulary(ImageVocabulary):
    """LaVIT's ids; the defaults are the original ones.

    tokens_per_image: the maximum number of codes of an image, its patches.
    """

    image_only_when_forced = True
    ignored_below_id = 3  # <unk>, <s> and </s>
    n_codes: int = 16384
    tokens_per_image: int = 256
    fewest_codes: int | None = field(default=1, kw_only=True)

    @cached_property
    def boi_id(self) -> int:
        """Id of an image's start."""
        return self.n_text

    @cached_property
    def code_start(self) -> int:
        """Id of code 0."""
        return self.n_text + 2


class LavitTexts(TextTokenizer):
    """Texts of LaVIT: image tokens have no names, so that `decode` skips them."""

    names_image_tokens = False
    vocabulary: LavitVocabulary

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.start_ids = ()  # prompts do not begin with `<s>`

    def text_ids(self, text: str) -> list[int]:
        """A user's text → ids without `<s>`; names of control tokens in it are letters."""
        return self.encode_parts([text])


class LavitTokenizer(LavitTexts, MultimodalTokenizer):
    """A plain LLaMA tokenizer with `LavitVocabulary`."""

    pad_token_id = 2

    @classmethod
    def from_pretrained(cls, folder: str | Path, vocabulary: LavitVocabulary | None = None) -> Self:
        """Read `tokenizer.model` and the optional configuration files of a folder.

        vocabulary: None: that of the folder's configuration, or the original one.

        Raises:
            CheckpointError: a file that is missing or damaged; more pieces than `vocabulary` has
                text.
        """
        files = read_files(Path(folder), names_image_tokens=False)
        n_pieces = files.vocabulary.n_text
        # Sizes that differ from the original's, as in small models.
        sizes: dict[str, int] = {}
        for name, key in (("n_codes", "image_codes"), ("tokens_per_image", "tokens_per_image")):
            if key in files.config:
                label = f"{folder}/tokenizer_config.json: {key}"
                sizes[name] = check_value(int, files.config[key], label, minimum=1)
        if vocabulary is None:
            vocabulary = LavitVocabulary(n_pieces, **sizes) if sizes else LavitVocabulary()
        files.vocabulary = vocabulary
        if n_pieces > vocabulary.n_text:
            raise CheckpointError(
                f"{folder}: the tokenizer has {n_pieces} pieces, but the image tokens begin "
                f"at {vocabulary.n_text}."
            )
        return cls(files)


class HubLavitVocabulary(LavitVocabulary):
    """LaVIT's ids behind those of a hub tokenizer, whose special tokens may have any ids."""

    ignored_below_id = 0


class HubLavitTokenizer(LavitTexts, HubTokenizer):
    """A hub tokenizer with LaVIT's image tokens."""

    def _image_vocabulary(self, n_text: int) -> LavitVocabulary:
        return HubLavitVocabulary(n_text, *self._sizes)


def load_lavit_tokenizer(folder: str | Path) -> LavitTokenizer | HubLavitTokenizer:
    """The tokenizer of a folder: with image tokens behind a hub tokenizer, or the original's."""
    if (Path(folder) / IMAGE_TOKENS).is_file():
        return HubLavitTokenizer.from_pretrained(folder)
    return LavitTokenizer.from_pretrained(folder)


# ---- prompts and answers


def read_prompt(
    vocabulary: LavitVocabulary, images: Sequence[Tensor], text_ids: Sequence[int] = ()
) -> Prompt:
    """Rows `[n, D]` of images, each between image start and end, and a text behind them."""
    ids: list[int] = []
    prompt_images: list[PromptImage] = []
    for rows in images:
        ids.append(vocabulary.boi_id)
        positions = range(len(ids), len(ids) + len(rows))
        prompt_images.append(PromptImage(rows, positions))
        # The features replace these ids.
        ids += [vocabulary.boi_id] * len(rows)
        ids.append(vocabulary.eoi_id)
    return Prompt([*ids, *text_ids], prompt_images)


@dataclass(frozen=True)
class QuestionProcessor:
    """Questions of the benchmarks in lower case, without . ! " ( ) * # : ; ~.

    max_words: from the beginning; the others are dropped.
    """

    max_words: int = 50

    def __call__(self, question: str) -> str:
        return question_text(question, self.max_words)


class Lemmatizer:
    """Answers in lower case, nouns and verbs in their base form, as in the original programs.

    Without spaCy or its model it warns once, and words keep their form.
    """

    def __init__(self) -> None:
        self._parse: Any = None
        try:
            self._parse = importlib.import_module("spacy").load(SPACY_MODEL)
        except (ImportError, OSError):  # the package, the model
            warnings.warn(
                f"Answers are not lemmatised as the original model's are, because spaCy or its "
                f"model {SPACY_MODEL} is not there ({install_hint('spacy')}, then python -m spacy "
                f"download {SPACY_MODEL}); scores can be lower by a little.",
                SeedWarning,
                stacklevel=2,
            )

    def __call__(self, answer: str) -> str:
        text = answer.lower()
        if self._parse is None:
            return " ".join(text.split())
        lemmas = [
            token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text
            for token in self._parse(text)
        ]
        return " ".join(lemmas)
