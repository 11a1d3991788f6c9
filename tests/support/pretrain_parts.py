"""A tiny LaVIT with data (images with captions, codes, plain text), for tests of its unified
pre-training."""

import dataclasses

import torch
from data_files import lines
from llm_runs import COLOURS, OPTIM, TRAINER, data_in, merged, write_llama
from PIL import Image
from tiny import spread
from tiny.lavit import CODES, PATCHES, TOKENIZER
from yaml_tables import read_tables

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.models.lavit.processing import LavitTokenizer
from seed_nano.train.words import train_text_tokenizer

# That of the systems, with the vision encoder's own width.
SIZES = dataclasses.replace(TOKENIZER, vit_head=0)
TEXTS = [
    "a red picture a green picture a blue picture a grey picture What is red? plain words of no "
    "picture"
] * 30


def image_of(colour: tuple[int, int, int], variant: int = 0) -> bytes:
    """A plain image with a spot."""
    image = Image.new("RGB", (24, 20), colour)
    image.paste((255, 255, 255), (variant % 4 * 5, 4, variant % 4 * 5 + 6, 12))
    return image_to_bytes(image)


def write_parts(folder):
    """Tokenizers, language model and data in `folder`."""
    tokenizer = train_text_tokenizer(
        LavitTokenizer,
        TEXTS,
        folder / "words",
        vocab_size=300,
        n_codes=CODES,
        tokens_per_image=PATCHES,
    )
    torch.manual_seed(0)
    model = spread(DynamicTokenizer(SIZES))  # so that patches differ
    model.save_pretrained(folder / "visual")
    write_llama(folder / "llm", tokenizer.vocabulary.n_text)
    # Images with captions.
    write_shard(
        folder / "captions.tar",
        (
            (name, {"png": image_of(colour, index), "txt": f"a {name} picture".encode()})
            for index, (name, colour) in enumerate(COLOURS.items())
        ),
    )
    # Texts alone, and images that are codes already: one to three of them.
    lines(
        folder / "words.jsonl", ({"text": f"plain words of no picture, {name}"} for name in COLOURS)
    )
    lines(
        folder / "codes.jsonl",
        (
            {"text": f"a {name}", "image_ids": [index, 2, 5][: 1 + index % 3]}
            for index, name in enumerate(COLOURS)
        ),
    )


def data_of(folder, **changes) -> dict:
    """A mixture of two parts text and one part images."""
    return {**data_in(folder, read_tables(__file__)), **changes}


def config_of(folder, output, **changes) -> dict:
    """A whole configuration; mappings in `changes` are merged into its groups."""
    return merged(
        {
            "output_dir": str(output),
            "tokenizer": {"pretrained_model_name_or_path": str(folder / "words")},
            "data": data_of(folder),
            "model": {"path": str(folder / "llm"), "dtype": "fp32"},
            "trainer": {**TRAINER, "max_steps": 6},
            "optim": {
                **OPTIM,
                "learning_rate": 5.0e-3,
                "part_rates": {"causal_encoder": 2.0e-2, "vit_proj": 2.0e-2},
            },
            "visual_encoder": {"path": str(folder / "visual")},
        },
        changes,
    )
