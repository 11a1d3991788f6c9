"""A small BPE tokenizer of transformers' fast kind, with ChatML as its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With a token before the text, a default system message, and headers, as Llama 3.
HEADERS = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\n\nBe short.<|im_end|>"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\n"
    "{{ message.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_hub_tokenizer(
    folder: Path,
    texts: Iterable[str],
    *,
    chat_template: str | None = CHATML,
    vocab_size: int = 300,
    bos: bool = False,
    eos: str = "<|im_end|>",
) -> Path:
    """Train the tokenizer and write its files; `bos`: texts begin with `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    config["pad_token"] = "<|endoftext|>"
    if bos:
        config["bos_token"] = "<|endoftext|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
