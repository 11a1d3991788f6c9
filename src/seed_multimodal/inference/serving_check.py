"""`seed check-llm`: whether a completion server (vLLM, SGLang) can read a language model.

Such a server has transformers, but not this package: it reads `config.json`, the weights and the
tokenizer's files as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.llm import check_vocab_size, llm_config, load_llm
from seed_multimodal.progress import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seed_multimodal.language.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Finding:
    """One thing that a server reads.

    problem: why it cannot, or "". note: what to know otherwise.
    """

    what: str
    problem: str = ""
    note: str = ""


def check_llm(llm: Path, tokenizer_folder: Path, served_tokenizer: Path) -> list[Finding]:
    """What a completion server reads of a language model's folder and a tokenizer's.

    tokenizer_folder: this package's. served_tokenizer: the server's, often the same.

    Raises CheckpointError: config.json or the tokenizer is missing, or cannot be read.
    """
    tokenizer = load_text_tokenizer(tokenizer_folder)
    return [_check_weights(llm, tokenizer), _check_tokenizer(served_tokenizer, tokenizer)]


def serve_command(llm: Path, tokenizer_folder: Path) -> str:
    """The command that starts vLLM with these folders."""
    return f"vllm serve {llm} --tokenizer {tokenizer_folder} --generation-config vllm"


def _check_weights(llm: Path, tokenizer: TextTokenizer) -> Finding:
    """The class by which a server finds its own, all tensors in their sizes, a row for a token."""
    config = llm_config(llm, tokenizer.special_ids)
    if not config.architectures:
        return Finding("weights", problem=f"{llm / 'config.json'} names no class in architectures")
    note = f"{config.architectures[0]}, {config.vocab_size} rows"
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method")
        return Finding("weights", note=f"{note}; quantized by {method}, so not compared")
    try:
        check_vocab_size(config.vocab_size, tokenizer.vocabulary, str(llm))
        load_llm(llm, device="meta", dtype="auto", tokenizer=tokenizer)
    except CheckpointError as error:
        return Finding("weights", problem=first_line(error))
    return Finding("weights", note=f"{note}, all tensors in their sizes")


def _check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> Finding:
    """Whether transformers alone reads the tokenizer, with the names of all image tokens.

    vLLM refuses `allowed_token_ids` beyond its tokenizer's length.
    """
    plain = _plain_tokenizer(folder)
    token = _first_unknown_token(plain, tokenizer)
    if token is not None:
        problem = f"transformers finds no {token} in {folder}; --tokenizer-out DIR writes it"
        return Finding("tokenizer", problem=problem)
    return Finding("tokenizer", note=f"{type(plain).__name__}, {len(plain)} tokens")


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
