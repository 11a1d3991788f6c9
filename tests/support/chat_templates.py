"""Chat templates of the structure that published models have, for small tokenizers.

Each is our own text; what it shares with its model is where texts, special tokens, system messages,
white space and empty blocks of thoughts stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from yaml_tables import read_tables


@dataclass(frozen=True)
class TemplateCase:
    """A template, and the special tokens of its tokenizer; `added`: tokens that are not special."""

    text: str
    special: Sequence[str]
    eos: str
    bos: str | None = None
    pad: str | None = None
    added: Sequence[str] = ()


TABLES = read_tables(__file__)
TEXT_TEMPLATES = {name: TemplateCase(**row) for name, row in TABLES["text"].items()}
IMAGE_TEMPLATES = {name: TemplateCase(**row) for name, row in TABLES["images"].items()}
