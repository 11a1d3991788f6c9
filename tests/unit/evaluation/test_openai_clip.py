"""OpenAI's CLIP file: the same embeddings as transformers' model with these tensors, and CLIP's
own word pieces."""

import pytest
import torch
from torch import Tensor
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.clip import NAME, load_openai_clip

WORDS = 49_408
OPENAI_NAMES = read_tables(__file__)


def as_openai(model) -> dict[str, Tensor]:
    """A transformers model's tensors under OpenAI's names."""
    state = model.state_dict()
    renamed = {}
    for name, value in state.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            letters = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            value = torch.cat(letters)
        if name.endswith("_projection.weight"):
            value = value.T
        name = name.removeprefix("vision_model.").removeprefix("text_model.")
        for stock_name, openai_name in OPENAI_NAMES.items():
            name = name.replace(stock_name, openai_name)
        renamed[name] = value
    return renamed


@torch.no_grad()
def test_embeddings_are_those_of_transformers(tmp_path):
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    sizes |= {"num_hidden_layers": 2, "projection_dim": 16}
    vision_config = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    stock_vision = CLIPVisionModelWithProjection(vision_config).eval()
    text_config = CLIPTextConfig(**sizes, vocab_size=WORDS, eos_token_id=WORDS - 1)
    stock_text = CLIPTextModelWithProjection(text_config).eval()
    visual = {f"visual.{name}": value for name, value in as_openai(stock_vision).items()}
    scale = {"logit_scale": torch.tensor(4.6)}
    torch.save({**visual, **as_openai(stock_text), **scale}, tmp_path / NAME)

    vision, texts = load_openai_clip(tmp_path / NAME, torch.device("cpu"))
    pixels = torch.randn(2, 3, 28, 28)
    expected = stock_vision(pixel_values=pixels).image_embeds
    torch.testing.assert_close(vision(pixel_values=pixels).image_embeds, expected)
    # As CLIP splits "a photo of a cat".
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407]])
    expected = torch.nn.functional.normalize(stock_text(ids).text_embeds, dim=-1)
    torch.testing.assert_close(texts(["a photo of a cat"]), expected)


def test_files_that_are_not_openai_clip(tmp_path):
    # A file of another model would be compared with nonsense.
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.bin")
    for name in ("other.bin", "archive.bin"):
        with pytest.raises(CheckpointError, match=name):
            load_openai_clip(tmp_path / name, torch.device("cpu"))
