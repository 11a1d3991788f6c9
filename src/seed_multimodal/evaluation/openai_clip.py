"""OpenAI's CLIP in one file, as LaVIT's folder holds it (`openai_clip_ViT-L-14.bin`).

    vision, texts = load_openai_clip("pretrained/LaVIT-7B-v2/openai_clip_ViT-L-14.bin", device)

The file holds weights only. The word pieces are those of `bpe_simple_vocab_16e6.txt.gz`, next to it or in the package
salesforce-lavis.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.retrieval import TextEncoder, text_embedder
from seed_multimodal.weights import assign_strictly, load_state_dict

NAME = "openai_clip_ViT-L-14.bin"
PIECES = "bpe_simple_vocab_16e6.txt.gz"
MERGES = (
    49_152 - 256 - 2
)  # those that CLIP uses; two pieces for each byte come before, two special ones after
# OpenAI's names → transformers', in a vision or text model.
RENAMED = (
    (r"^visual\.class_embedding$", "embeddings.class_embedding"),
    (r"^visual\.conv1", "embeddings.patch_embedding"),
    (r"^(visual\.)?positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^visual\.ln_pre", "pre_layrnorm"),
    (r"^visual\.ln_post", "post_layernorm"),
    (r"^ln_final", "final_layer_norm"),
    (r"^(visual\.)?transformer\.resblocks", "encoder.layers"),
    (r"\.attn\.out_proj", ".self_attn.out_proj"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
)


def load_openai_clip(file: str | Path, device: torch.device) -> tuple[Any, TextEncoder]:
    """Vision encoder (with `.image_embeds`) and text encoder, in fp32. Raises CheckpointError: another file, or no
    word pieces."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    try:
        state = load_state_dict(file)
    except (
        CheckpointError
    ) as error:  # torch reads TorchScript archives, which are programs, by torch.jit.load only
        raise CheckpointError(
            f"{error} OpenAI's own archive is a TorchScript program, which is not run: save its "
            "state_dict() in its place, or name a transformers folder by --clip."
        ) from error
    for name in ("visual.proj", "text_projection", "visual.conv1.weight", "positional_embedding"):
        if name not in state:
            raise CheckpointError(
                f"{file}: not the weights of OpenAI's CLIP, it holds no {name!r}; name a "
                "transformers folder by --clip."
            )

    # The sizes of both models are those of their tensors.
    patches = len(state["visual.positional_embedding"]) - 1
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=_layers(state, "visual."),
            num_attention_heads=max(width // 64, 1),
            patch_size=patch,
            image_size=patch * int(patches**0.5 + 0.5),
            projection_dim=state["visual.proj"].shape[1],
        )
    )
    words, width = state["token_embedding.weight"].shape
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=_layers(state, ""),
            vocab_size=words,
            num_attention_heads=max(width // 64, 1),
            max_position_embeddings=len(state["positional_embedding"]),
            projection_dim=state["text_projection"].shape[1],
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        )
    )

    for model, prefix in ((vision, "vision_model."), (text, "text_model.")):
        assign_strictly(model, _renamed(state, prefix), file, allow_unexpected=["*position_ids"])
        model.to(device).requires_grad_(False).eval()
    return vision, text_embedder(text, read_pieces(Path(file).parent), device)


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    """The number of Transformer blocks of a part."""
    start = f"{part}transformer.resblocks."
    return 1 + max(
        int(name.removeprefix(start).split(".")[0]) for name in state if name.startswith(start)
    )


def _renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of the vision or text model by transformers' names."""
    # The projection, which OpenAI multiplies from the right.
    is_vision = prefix == "vision_model."
    projection = "visual.proj" if is_vision else "text_projection"
    new_projection = "visual_projection.weight" if is_vision else "text_projection.weight"
    renamed = {new_projection: state[projection].float().T.contiguous()}

    # All other tensors of this model, without scalars that describe the file's model (such as `logit_scale`).
    for name, value in state.items():
        is_tensor = "." in name or name == "positional_embedding"
        if name.startswith("visual.") != is_vision or name == projection or not is_tensor:
            continue
        short = name
        for pattern, new in RENAMED:
            short = re.sub(pattern, new, short)
        if ".attn.in_proj_" in short:  # queries, keys and values in one
            block, kind = short.split(".attn.in_proj_")
            for letter, part in zip("qkv", value.float().chunk(3), strict=True):
                renamed[f"{prefix}{block}.self_attn.{letter}_proj.{kind}"] = part
        else:
            renamed[prefix + short] = value.float()
    return renamed


def read_pieces(folder: Path) -> Any:
    """CLIP's tokenizer of transformers. Raises CheckpointError: no file of word pieces."""
    from transformers import CLIPTokenizer

    folders = [folder]
    lavis = importlib.util.find_spec("lavis")
    if lavis is not None:
        folders += [
            Path(package) / "models" / "clip_models"
            for package in lavis.submodule_search_locations or ()
        ]
    file = next((place / PIECES for place in folders if (place / PIECES).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder / PIECES}: CLIP's word pieces are not there, nor salesforce-lavis, which has "
            "them; put that file of OpenAI's CLIP there, or name a transformers folder by --clip."
        )

    # The vocabulary in CLIP's order: bytes, bytes that end a word, merged pieces, special tokens.
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = list(_byte_letters())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(line.split()) for line in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "vocab.json").write_text(
            json.dumps({piece: row for row, piece in enumerate(pieces)})
        )
        (Path(scratch) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in the pieces: printable ones for themselves, in CLIP's order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
