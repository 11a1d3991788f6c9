"""OpenAI's CLIP file: the same embeddings as transformers' model with these tensors, and CLIP's
own word pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.drawing import ClipScores
from seed_multimodal.evaluation.openai_clip import NAME, load_openai_clip

WORDS = 49_408
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OUTER = {
    "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
}


def as_openai(model: torch.nn.Module, part: str) -> dict[str, Tensor]:
    """A transformers model's tensors under OpenAI's names."""
    state = {
        name.partition("_model.")[2] or name: value for name, value in model.state_dict().items()
    }
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if name.endswith("_projection.weight"):
            renamed["visual.proj" if part else "text_projection"] = value.T
        elif name == "embeddings.class_embedding":
            renamed["visual.class_embedding"] = value
        elif module == "embeddings.position_embedding":
            renamed[f"{part}positional_embedding"] = value
        elif module in OUTER:
            renamed[f"{part}{OUTER[module]}.{kind}"] = value
        elif ".q_proj" in name:
            three = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            block = module.split(".")[2]
            renamed[f"{part}transformer.resblocks.{block}.attn.in_proj_{kind}"] = three
        elif module.startswith("encoder.") and "k_proj" not in name and "v_proj" not in name:
            _, _, block, inner = module.split(".", 3)
            renamed[f"{part}transformer.resblocks.{block}.{BLOCK[inner]}.{kind}"] = value
    return renamed


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 16,
    }
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    ).eval()
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(**sizes, vocab_size=WORDS, eos_token_id=WORDS - 1)
    ).eval()
    return vision, text


@pytest.fixture(scope="module")
def file(models: tuple[torch.nn.Module, torch.nn.Module], tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("clip") / NAME
    tensors = {
        **as_openai(models[0], "visual."),
        **as_openai(models[1], ""),
        "logit_scale": torch.tensor(4.6),
    }
    torch.save(tensors, file)
    return file


@torch.no_grad()
def test_embeddings_are_those_of_transformers(
    file: Path, models: tuple[torch.nn.Module, torch.nn.Module]
):
    vision, texts = load_openai_clip(file, torch.device("cpu"))
    pixels = torch.randn(2, 3, 28, 28)
    expected = models[0](pixel_values=pixels).image_embeds
    torch.testing.assert_close(vision(pixel_values=pixels).image_embeds, expected)
    # As CLIP splits "a photo of a cat".
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407]])
    expected = torch.nn.functional.normalize(models[1](ids).text_embeds, dim=-1)
    torch.testing.assert_close(texts(["a photo of a cat"]), expected)
    clip = ClipScores(file, torch.device("cpu"))
    [cosines] = clip.cosines(["a cat"], [[Image.new("RGB", (40, 30))] * 2])
    assert len(cosines) == 2


def test_files_that_are_not_openai_clip(tmp_path):
    # A file of another model would be compared with nonsense.
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.bin")
    for name in ("other.bin", "archive.bin"):
        with pytest.raises(CheckpointError, match=name):
            load_openai_clip(tmp_path / name, torch.device("cpu"))
