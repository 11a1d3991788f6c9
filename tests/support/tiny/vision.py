"""Random vision models of transformers, written to a folder as their publishers do."""

from pathlib import Path

import torch
from yaml_tables import read_tables

from tiny import spread, write_json

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = read_tables(__file__)


def write_vision(kind: str, folder, side=16):
    """The model of a kind, random and with features that differ between images, in a folder.

    side: pixels a side after cropping.
    """
    import transformers

    entry = KINDS[kind]
    preprocessor = entry["preprocessor"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{entry['model']}Config")(**entry["sizes"])
    model = getattr(transformers, f"{entry['model']}Model")(config).eval()
    spread(model).save_pretrained(folder)
    if side != 16:
        preprocessor = {**preprocessor, "crop_size": side, "size": {"shortest_edge": side}}
    write_json(folder / "preprocessor_config.json", preprocessor)
    return model


def write_clip(folder, width=16, side=64, **text: int) -> Path:
    """A whole CLIP with embeddings of this width; `text`: further fields of its texts' side."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    texts = {**sizes, "vocab_size": 99, **text}
    images = {**sizes, "image_size": side, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=texts, vision_config=images, projection_dim=width)
    CLIPModel(config).save_pretrained(folder)
    return folder
