"""A small BPE tokenizer of transformers' fast kind, with ChatML as its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from chat_templates import TemplateCase

from seed_multimodal.cli.tiny_parts import CHATML, CHATML_TOKENS, write_bpe_tokenizer

DEFAULT = TemplateCase(CHATML, CHATML_TOKENS, eos="<|im_end|>", pad="<|endoftext|>")


def write_hub_tokenizer(
    folder: Path,
    texts: Iterable[str],
    case: TemplateCase = DEFAULT,
    *,
    vocab_size: int = 300,
) -> Path:
    """Train the tokenizer and write its files."""
    write_bpe_tokenizer(
        folder,
        texts,
        case.text,
        case.special,
        eos=case.eos,
        pad=case.pad,
        bos=case.bos,
        added=case.added,
        vocab_size=vocab_size,
    )
    return folder
