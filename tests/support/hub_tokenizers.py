"""A small BPE tokenizer of transformers' fast kind, with ChatML as its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from chat_templates import TemplateCase

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT = TemplateCase(CHATML, SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")


def write_hub_tokenizer(
    folder: Path,
    texts: Iterable[str],
    case: TemplateCase = DEFAULT,
    *,
    vocab_size: int = 300,
) -> Path:
    """Train the tokenizer and write its files."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    # 1. The tokenizer.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(case.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in case.added])

    # 2. Its files.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": case.eos}
    if case.pad is not None:
        config["pad_token"] = case.pad
    if case.bos is not None:
        config["bos_token"] = case.bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{case.bos} $A",
            special_tokens=[(case.bos, tokenizer.token_to_id(case.bos))],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if case.text:
        (folder / "chat_template.jinja").write_text(case.text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
