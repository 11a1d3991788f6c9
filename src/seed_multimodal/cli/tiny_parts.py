"""Small random parts of the classes that a recipe names: a language model with its tokenizer, and a
vision encoder. For runs of the whole recipe in minutes, and for tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.config import read_table
from seed_multimodal.device import seeded
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD, PROCESSOR
from seed_multimodal.language.hub_tokenizer import FILES, HubTokenizer
from seed_multimodal.language.llm import check_sizes, llm_config
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.progress import quiet_loading
from seed_multimodal.weights.find import find_folder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Sizes of the language model and of the vision encoder, and what depends on sizes.
_TABLES = read_table(__file__)
ROWS = 64  # embedding tables are padded to a multiple of it, as published models' are


def write_tiny_llm(source: str, texts: Iterable[str], folder: Path) -> None:
    """A random language model of `source`'s class.

    source: a `model_type` (qwen3), whose tokenizer is trained on the texts; or the folder or hub id
        of a model, whose tokenizer is copied.

    Raises:
        CheckpointError, ConfigError: no such class, or no such part.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # 1. The configuration and the tokenizer.
    if source in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = AutoConfig.for_model(source)
        check_sizes(config, source)
        write_bpe_tokenizer(
            folder,
            texts,
            CHATML,
            CHATML_TOKENS,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            vocab_size=512,
        )
    else:
        advice = "name a class (qwen3), or a folder or hub id of this class"
        parts = find_folder(source, ("config.json", *FILES), advice)
        config = llm_config(parts)
        folder.mkdir(parents=True)
        for name in FILES:
            if (parts / name).is_file():
                shutil.copyfile(parts / name, folder / name)

    # 2. The model, with the tokenizer's ids and rows of padding.
    tokenizer = HubTokenizer.create(folder, n_codes=1, tokens_per_image=1)
    values = shrink(config.to_dict(), _TABLES["llm"])
    values |= tokenizer.special_ids
    values["vocab_size"] = -(-tokenizer.vocabulary.n_text // ROWS) * ROWS
    # One layer of each type: by default a type may stand in each sixth layer only.
    layer_types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if len(layer_types) > 1:
        values |= {"layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    save_random(AutoModelForCausalLM, source, values, folder)


def write_tiny_encoder(source: str, folder: Path) -> None:
    """A random vision encoder of `source`'s class for images of 64 pixels.

    source: a class (siglip2, clip, dinov2, dinov3), or the folder or hub id of a model, whose mean
        and deviation the images keep.

    Raises:
        CheckpointError, ConfigError: no such class, or no such part.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    # 1. The configuration.
    candidates = (f"{source}_vision_model", f"{source}_vit", source)
    model_type = next((name for name in candidates if name in CONFIG_MAPPING), None)
    mean = CLIP_MEAN
    std = CLIP_STD
    if model_type is not None:
        network = CONFIG_MAPPING[model_type]().to_dict()
    else:
        part = HubVisionConfig(path=source)
        network = part.network
        mean = part.preprocessing.mean
        std = part.preprocessing.std

    # 2. The network, and its preprocessing.
    save_random(AutoModel, source, shrink(network, _TABLES["vision"]), folder)
    side = _TABLES["vision"]["image_size"]
    size = {"height": side, "width": side}
    preprocessing = {"image_mean": mean, "image_std": std, "size": size, "resample": 2}
    (folder / PROCESSOR).write_text(json.dumps(preprocessing), encoding="utf-8")


def save_random(auto_class: Any, source: str, config: JsonObject, folder: Path) -> None:
    """Save a model with random weights. Raises ConfigError: its class cannot have these sizes.

    auto_class: of transformers.
    """
    from transformers import AutoConfig

    try:
        with seeded(0):
            model = auto_class.from_config(AutoConfig.for_model(**config))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source}: no small network of this class can be made ({first_line(error)})."
        ) from error
    with quiet_loading("transformers"):
        model.save_pretrained(folder)


def shrink(config: JsonObject, sizes: Mapping[str, int]) -> JsonObject:
    """A configuration with other sizes, as far as it has them."""
    values = {key: value for key, value in config.items() if key not in _TABLES["derived"]}
    for key, size in sizes.items():
        if isinstance(values.get(key), int):
            values[key] = size
    return values


def write_bpe_tokenizer(
    folder: Path,
    texts: Iterable[str],
    chat_template: str,
    special: Sequence[str],
    *,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    added: Sequence[str] = (),
    vocab_size: int,
) -> None:
    """Train a byte-level BPE tokenizer and write the files of a hub tokenizer.

    special: its special tokens, which have the first ids.
    added: tokens behind the others that are not special.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    # 1. The tokenizer.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in added])

    # 2. Its files.
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        chat_template=chat_template,
    ).save_pretrained(folder)
