"""`seed check-llm`: a tokenizer that a completion server (vLLM, SGLang) can read.

Such a server has transformers, but not this package, and vLLM refuses `allowed_token_ids` beyond
its tokenizer's length.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.progress import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seed_multimodal.language.text_tokenizer import TextTokenizer


def write_server_tokenizer(folder: Path, out: Path) -> None:
    """Write the tokenizer of `folder` to `out`, with image tokens that transformers reads.

    Raises CheckpointError: they would get other ids.
    """
    tokenizer = load_text_tokenizer(folder)
    plain = _plain_tokenizer(folder)
    vocabulary = tokenizer.vocabulary
    if _first_unknown_token(plain, tokenizer) is not None:
        plain.add_tokens(tokenizer.tokens(range(vocabulary.n_text, vocabulary.size)))
    if _first_unknown_token(plain, tokenizer) is not None:
        raise CheckpointError(
            f"{folder}: has unused ids before {vocabulary.n_text}, so image tokens that "
            "transformers adds would get other ids."
        )
    plain.save_pretrained(out)


def server_problem(folder: Path, served: Path) -> str:
    """Why a server does not find the image tokens of the tokenizer `folder` in `served`, or "".

    Raises CheckpointError: a tokenizer is missing, or cannot be read.
    """
    token = _first_unknown_token(_plain_tokenizer(served), load_text_tokenizer(folder))
    if token is None:
        return ""
    return f"transformers finds no {token} in {served}; --tokenizer-out DIR writes it"


def _plain_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers alone reads it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        with quiet_loading("transformers"):
            plain: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False
            )
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: transformers cannot read it ({reason}).") from error
    return plain


def _first_unknown_token(plain: PreTrainedTokenizerBase, tokenizer: TextTokenizer) -> str | None:
    """The first image token that transformers has not at its id."""
    vocabulary = tokenizer.vocabulary
    ids = list(range(vocabulary.n_text, vocabulary.size))
    names = plain.convert_ids_to_tokens(ids)
    for name, expected in zip(names, tokenizer.tokens(ids), strict=True):
        if name != expected:
            return expected
    return None
