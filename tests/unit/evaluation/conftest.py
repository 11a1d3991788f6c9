"""Tiny models that judge or compare, and a tiny tokenizer with its stage-1 checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP in transformers' layout, whose tokens are letters."""
    from tiny.diffusion import END_ID, PIECES, START_ID, write_pieces
    from tiny.vision import write_clip

    folder = tmp_path_factory.mktemp("clip")
    write_pieces(folder)
    ids = {"bos_token_id": START_ID, "eos_token_id": END_ID}
    return write_clip(folder, 8, 16, vocab_size=len(PIECES), max_position_embeddings=32, **ids)


@dataclass
class Stages:
    """A tokenizer's folder, the stage-1 checkpoint that it came from, and a BERT tokenizer's
    folder."""

    tokenizer: Path
    stage1: Path
    vocabulary: Path


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Stages:
    from tiny.seed import SIZES, write_stages

    from seed_multimodal.models.seed.configuration import Seed2Config
    from seed_multimodal.recipes.seed.export import export_tokenizer

    folder = tmp_path_factory.mktemp("stages")
    vocabulary = "a red green blue grey square of".split()
    config = Seed2Config(**SIZES, image_features_dim=10)
    torch.manual_seed(0)
    write_stages(config, folder, vocab_size=len(vocabulary) + 6)
    files = {"stage1": folder / "stage1.pth", "vision": folder / "eva_vit_g.pth"}
    export_tokenizer(folder / "stage2.pth", folder / "tokenizer", config=config, **files)
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary]) + "\n"
    )
    return Stages(folder / "tokenizer", folder / "stage1.pth", folder / "bert")
