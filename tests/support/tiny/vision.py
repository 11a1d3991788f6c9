"""Random vision models of transformers, written to a folder as their publishers do."""

from pathlib import Path

import torch

from tiny import spread, write_json

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": 16, "patch_size": 8}
# Kind -> model and configuration class, its sizes, its preprocessor_config.json, and its tokens in
# front of the patches.
KINDS = {
    "siglip": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**SIZES, **PIXELS, "intermediate_size": 24},
        {**HALF, "size": {"height": 16, "width": 16}, "resample": 2},
        0,
    ),
    "siglip2": (
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**SIZES, "patch_size": 8, "num_patches": 4, "intermediate_size": 24},
        {**HALF, "patch_size": 8, "max_num_patches": 4, "resample": 2},
        0,
    ),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {**SIZES, "image_size": 24, "patch_size": 8},  # trained on larger images
        {
            **IMAGENET,
            "size": {"shortest_edge": 20},
            "crop_size": {"height": 16, "width": 16},
            "resample": 3,
        },
        1,
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**SIZES, **PIXELS, "intermediate_size": 24, "num_register_tokens": 2},
        {**IMAGENET, "size": {"height": 16, "width": 16}, "resample": 2},
        3,
    ),
    "clip": (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        {**SIZES, **PIXELS, "intermediate_size": 24},
        {"size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3},
        1,
    ),
}


def write_vision(kind: str, folder, side=16):
    """The model of a kind, random and with features that differ between images, in a folder.

    side: pixels a side after cropping.
    """
    import transformers

    model_name, config_name, sizes, preprocessor, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes)
    model = getattr(transformers, model_name)(config).eval()
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
