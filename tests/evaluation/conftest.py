"""A tiny CLIP for the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def clip_words(folder: Path) -> Path:
    """CLIP's kind of tokenizer with letters alone."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with transformers' layout that reads letters."""
    from transformers import CLIPConfig, CLIPModel

    folder = clip_words(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(json.loads((folder / "vocab.json").read_text()))
    CLIPModel(CLIPConfig(
        projection_dim=8, vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": size, "max_position_embeddings": 8, "bos_token_id": size - 2,
                     "eos_token_id": size - 1})).save_pretrained(folder)
    return folder
